// Forms send JSON and say what came of it beside the field; parts of a page with `data-live` keep themselves current.
const start = root => {
  if (typeof drawCharts === 'function') drawCharts(root);
  if (typeof makeComparisons === 'function') makeComparisons(root);
  for (const form of root.querySelectorAll('form[data-post]')) form.addEventListener('submit', send);
  for (const text of root.querySelectorAll('[data-copy]')) addCopyButton(text);
  for (const box of root.querySelectorAll('[data-live]')) keepCurrent(box);
  for (const image of root.querySelectorAll('img[data-tell]')) tellProblem(image);
};

// Puts what is wrong with an image in its place.
const tellProblem = image => {
  const tell = async () => {
    const found = await ask(image.src).catch(() => ({error: 'the studio does not answer'}));
    const note = Object.assign(document.createElement('p'), {className: 'said bad', textContent: found.error || image.alt});
    (image.closest('.frame') || image).replaceWith(note);
  };
  if (image.complete && image.currentSrc && !image.naturalWidth) tell();
  else image.addEventListener('error', tell);
};

const addCopyButton = text => {
  const button = Object.assign(document.createElement('button'), {type: 'button', className: 'small', textContent: 'copy'});
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(text.textContent);
    button.textContent = 'copied';
  });
  text.after(button);
};

// Values of a form: texts, numbers (data-kind=number), switches, and lists of what is checked (data-kind=list).
const valuesOf = form => {
  const values = {};
  for (const field of form.elements) {
    if (!field.name || field.disabled) continue;
    const kind = field.dataset.kind || field.type;
    if (kind === 'list') {
      values[field.name] = values[field.name] || [];
      if (field.checked) values[field.name].push(field.value);
    } else if (kind === 'checkbox') values[field.name] = field.checked;
    else if (kind === 'radio') { if (field.checked) values[field.name] = field.value; }
    else if (kind === 'number') values[field.name] = field.value === '' ? null : Number(field.value);
    else if (kind === 'lines') values[field.name] = field.value.split('\n').filter(line => line.trim());
    else values[field.name] = field.value;
  }
  return values;
};

const ask = async (address, body) => {
  const options = body === undefined ? {} : {
    method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body),
  };
  const answer = await fetch(address, options);
  const text = await answer.text();
  if (body === undefined && answer.ok) return {html: text};
  try {
    const found = JSON.parse(text);
    return answer.ok ? found : {error: found.error || `error ${answer.status}`, field: found.field};
  } catch { return {error: `the studio answered with error ${answer.status}`}; }
};

// A field may be called dataset, which hides `form.dataset`.
const send = async event => {
  event.preventDefault();
  const form = event.currentTarget, buttons = form.querySelectorAll('button');
  for (const old of form.querySelectorAll('.said')) old.remove();
  for (const field of form.elements) field.removeAttribute('aria-invalid');
  const values = valuesOf(form);
  if (event.submitter && event.submitter.name) values[event.submitter.name] = event.submitter.value;
  for (const button of buttons) button.disabled = true;
  let found;
  try { found = await ask(form.getAttribute('data-post'), values); }
  catch { found = {error: 'the studio does not answer: is it still running?'}; }
  for (const button of buttons) button.disabled = false;
  if (found.redirect) { location.assign(found.redirect); return; }
  if (found.html !== undefined) {
    const into = document.querySelector(form.getAttribute('data-into'));
    into.innerHTML = found.html;
    start(into);
  }
  const said = found.error || found.message;
  if (!said) return;
  const note = Object.assign(document.createElement('p'), {className: found.error ? 'said bad' : 'said', textContent: said});
  note.setAttribute('role', found.error ? 'alert' : 'status');
  const field = found.field && form.elements[found.field];
  if (field instanceof HTMLElement) {
    field.setAttribute('aria-invalid', 'true');
    (field.closest('label') || field).after(note);
    field.focus();
  } else form.append(note);
};

// Asks again every 2 seconds, and replaces the part only where something changed, so that nothing jumps.
const keepCurrent = box => {
  let before = null, missed = 0;
  const turn = async () => {
    if (!box.isConnected) return;
    if (!document.hidden) {
      let found;
      try { found = await ask(box.dataset.live); } catch { found = {}; }
      missed = found.html === undefined ? missed + 1 : 0;
      box.classList.toggle('stale', missed > 2);
      const isUsed = box.contains(document.activeElement) && document.activeElement.matches('input, textarea, select');
      if (found.html !== undefined && found.html !== before && !isUsed) {
        before = found.html;
        box.innerHTML = found.html;
        start(box);
      }
    }
    setTimeout(turn, 2000);
  };
  turn();
};

start(document);

// Attributes of forms are read by getAttribute: a field named `dataset` would be form.dataset.
// Forms send JSON and say what came of it beside the field; parts of a page with `data-live` keep themselves current.
const start = root => {
  if (typeof drawCharts === 'function') drawCharts(root);
  if (typeof makeComparisons === 'function') makeComparisons(root);
  for (const form of root.querySelectorAll('form[data-post]')) form.addEventListener('submit', send);
  for (const text of root.querySelectorAll('[data-copy]')) addCopyButton(text);
  for (const box of root.querySelectorAll('[data-live]')) keepCurrent(box);
  for (const field of root.querySelectorAll('[data-refresh]')) field.addEventListener('change', refresh);
  for (const field of root.querySelectorAll('[data-go]'))
    field.addEventListener('change', () => location.assign(withPath(field.dataset.go + encodeURIComponent(field.value))));
  for (const link of root.querySelectorAll('.cases a'))
    link.addEventListener('click', () => { link.href = withPath(link.href); });
  for (const log of root.querySelectorAll('.log')) log.scrollTop = log.scrollHeight;
  for (const button of root.querySelectorAll('[data-add]')) button.addEventListener('click', () => {
    const field = document.querySelector(button.dataset.add);
    field.value = [field.value.trimEnd(), button.value].filter(Boolean).join('\n');
  });
  for (const field of root.querySelectorAll('[data-filter]')) field.addEventListener('input', () => filter(field));
  for (const image of root.querySelectorAll('img[data-tell]')) tellProblem(image);
};

// Keeps a path that was typed when another experiment is chosen.
const withPath = address => {
  const field = document.querySelector('[name="dataset.path"]'), found = new URL(address, location);
  if (field && field.value !== field.dataset.default) found.searchParams.set('path', field.value);
  return found.href;
};

// Shows only the rows of `data-filter` that have all words.
const filter = field => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of document.querySelectorAll(field.dataset.filter))
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
};

// Fetches the part of a form again that depends on the field that changed.
const refresh = async event => {
  const field = event.currentTarget, into = document.querySelector(field.dataset.into);
  const found = await ask(field.dataset.refresh, valuesOf(field.form));
  if (found.html === undefined) return say(field.form, found);
  into.innerHTML = found.html;
  start(into);
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

// Values of a form: texts, numbers (data-kind=number), switches, and lists of what is checked (data-kind=list). What has
// data-in=X is in a group X, and is left out there if it is its data-default.
const linesOf = field => field.value.split('\n').filter(line => line.trim());
const valuesOf = form => {
  const values = {};
  for (const field of form.elements) {
    if (!field.name || field.disabled) continue;
    const kind = field.dataset.kind || field.type;
    if (field.dataset.in) {
      const group = values[field.dataset.in] = values[field.dataset.in] || {};
      if (field.value !== field.dataset.default) group[field.name] = kind === 'lines' ? linesOf(field) : field.value;
    } else if (kind === 'list') {
      values[field.name] = values[field.name] || [];
      if (field.checked) values[field.name].push(field.value);
    } else if (kind === 'checkbox') values[field.name] = field.checked;
    else if (kind === 'radio') { if (field.checked) values[field.name] = field.value; }
    else if (kind === 'number') values[field.name] = field.value === '' ? null : Number(field.value);
    else if (kind === 'lines') values[field.name] = linesOf(field);
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
  const address = (event.submitter && event.submitter.dataset.post) || form.getAttribute('data-post');
  try { found = await ask(address, values); }
  catch { found = {error: 'the studio does not answer: is it still running?'}; }
  for (const button of buttons) button.disabled = false;
  if (found.redirect) { location.assign(found.redirect); return; }
  if (found.html !== undefined) {
    const into = document.querySelector((event.submitter && event.submitter.dataset.into) || form.getAttribute('data-into'));
    into.innerHTML = found.html;
    start(into);
  }
  say(form, found);
};

// Says what came of a form: beside the field that it is about, else at the form's end.
const say = (form, found) => {
  const said = found.error || found.message;
  if (!said) return;
  const note = Object.assign(document.createElement('p'), {className: found.error ? 'said bad' : 'said', textContent: said});
  note.setAttribute('role', found.error ? 'alert' : 'status');
  const field = found.field && form.elements[found.field];
  if (field instanceof HTMLElement) {
    field.setAttribute('aria-invalid', 'true');
    for (let box = field.closest('details'); box; box = box.parentElement.closest('details')) box.open = true;
    if (field.closest('label')) field.closest('label').append(note);
    else field.after(note);
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

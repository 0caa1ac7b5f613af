// Put a slider over the base's image and a second one into each comparison; the thumbnails below choose the second.
const makeComparisons = root => { for (const cell of root.querySelectorAll('.cell')) {
  const buttons = [...cell.querySelectorAll('.strip button')];
  if (buttons.length < 2 || cell.querySelector('.compare')) continue;
  const make = (tag, className, parent) => {
    const element = document.createElement(tag);
    element.className = className;
    if (parent) parent.append(element);
    return element;
  };
  const compare = make('div', 'compare'), names = make('div', 'names');
  const before = make('img', 'before', compare), after = make('img', 'after', compare);
  const handle = Object.assign(make('input', '', compare), {type: 'range', min: 0, max: 100, step: 1, value: 50});
  const left = make('span', '', names), right = make('span', '', names);
  const show = (button, image, name) => {
    const {src, alt} = button.querySelector('img');
    Object.assign(image, {src, alt});
    name.textContent = button.dataset.name;
  };
  const move = () => {
    compare.style.setProperty('--at', handle.value + '%');
    handle.setAttribute('aria-valuetext', `${handle.value} % ${left.textContent}`);
  };
  const choose = chosen => {
    for (const button of buttons) button.setAttribute('aria-pressed', button === chosen);
    show(chosen, after, right);
  };
  const follow = event => {
    const box = compare.getBoundingClientRect();
    handle.value = Math.round(100 * (event.clientX - box.left) / box.width);
    move();
  };
  let held = false;
  handle.addEventListener('input', move);
  handle.addEventListener('pointerdown', event => {
    event.preventDefault();  // a browser would put the knob next to the pointer
    held = true;
    handle.focus({preventScroll: true});
    handle.setPointerCapture(event.pointerId);
    follow(event);
  });
  handle.addEventListener('pointermove', event => { if (held) follow(event); });
  for (const end of ['pointerup', 'pointercancel'])
    handle.addEventListener(end, event => {
      if (held && end === 'pointerup') follow(event);
      held = false;
    });
  for (const button of buttons) button.addEventListener('click', () => choose(button));
  show(buttons[0], before, left);
  handle.setAttribute('aria-label', `how much of ${left.textContent} is shown: ${cell.dataset.label}`);
  choose(buttons.find(button => 'first' in button.dataset) || buttons.at(-1));
  move();
  cell.querySelector('.strip').before(compare, names);
} };
makeComparisons(document);

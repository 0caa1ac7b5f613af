// Draw each chart of `root` with uPlot: at the width of its figure, in the colors of the page, light or dark.
const text = value => value == null ? '' : String(+value.toPrecision(4));
const colorOf = name => () => getComputedStyle(document.body).getPropertyValue(name).trim();
const wholeSteps = [...Array(12).keys()].flatMap(power => [1, 2, 5].map(factor => factor * 10 ** power));
const drawCharts = root => { for (const box of root.querySelectorAll('[data-chart]')) {
  if (box.chart) continue;
  const {logarithmic, series} = JSON.parse(box.dataset.chart);
  const axis = {
    stroke: () => getComputedStyle(document.body).color, font: '12px system-ui', ticks: {show: false},
    values: (_, values) => values.map(text),
  };
  const gridLine = value => logarithmic && Math.log10(value) % 1 ? null : value;
  const size = () => ({width: box.clientWidth, height: 220});
  box.setAttribute('aria-label', box.textContent);
  box.textContent = '';
  const chart = box.chart = new uPlot({
    ...size(),
    cursor: {drag: {x: false}},
    scales: {x: {time: false}, y: {distr: logarithmic ? 3 : 1}},
    axes: [
      {...axis, size: 26, grid: {show: false}, incrs: wholeSteps, label: 'step', labelSize: 16, labelFont: axis.font},
      {...axis, size: (_, values) => 12 + 7 * Math.max(...(values || ['']).map(value => value.length)),
        grid: {stroke: colorOf('--line'), width: 1, filter: (_, splits) => splits.map(gridLine)}},
    ],
    series: [{label: 'step', value: (_, value) => text(value)}, ...series.map(one => ({
      label: one.name, stroke: colorOf(`--c${one.color}`), width: one.faint ? 1 : 2, alpha: one.faint ? .35 : 1,
      class: one.faint ? 'faint' : 'line', value: (_, value) => text(value),
    }))],
  }, uPlot.join(series.map(one => [one.steps, one.values])), box);
  new ResizeObserver(() => chart.setSize(size())).observe(box);
} };
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  for (const box of document.querySelectorAll('[data-chart]')) box.chart.redraw();  // none that a page has replaced
});
drawCharts(document);

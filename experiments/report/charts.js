"use strict";
// Charts with axes are uPlot's; small ones without are SVG, which follows the theme by itself.

// Where a logarithmic axis has its marks: at powers of ten, and between them where there are few.
function decades(chart, axis, low, high) {
  const marks = [], within = high / low < 300 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    marks.push(...within.map((first) => Number(`${first}e${power}`)).filter((mark) => mark >= low && mark <= high));
  }
  return marks;
}

// Lines: [{name, color: "--variable", values, dash, width, stepped, low, high}].
function lineChart(target, { label, x, y, lines, height = 340 }) {
  const values = [x.values], series = [{}], areas = [], readings = [];
  const legend = element("ul", { class: "legend" });
  for (const line of lines) {
    if (line.low) {
      areas.push({ series: [values.length, values.length + 1], line });
      values.push(line.high, line.low);
      series.push({ line, hidden: true }, { line, hidden: true });
    }
    const reading = element("output", {});
    const swatch = shape("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" },
      shape("line", { x1: 0, x2: 22, y1: 4, y2: 4, style: `stroke: var(${line.color})`, "stroke-dasharray": line.dash ? "5 3" : null }));
    legend.append(element("li", {}, swatch, line.name, reading));
    readings.push([values.length, reading]);
    values.push(line.values);
    series.push({ line });
  }
  const holder = element("div", { class: "plot", role: "img", "aria-label": label });
  target.replaceChildren(legend, holder);
  let plot = null;
  const size = () => ({ width: Math.max(240, holder.clientWidth), height: holder.clientWidth < 520 ? Math.min(height, 260) : height });

  function draw() {
    if (plot) plot.destroy();
    const ink = color("--muted"), grid = color("--grid"), font = "12px system-ui, sans-serif";
    const axis = { stroke: ink, font, labelFont: font, ticks: { show: false }, grid: { stroke: grid, width: 1 } };
    const stepped = uPlot.paths.stepped({ align: -1 }), bars = uPlot.paths.bars({ size: [0.7, 60] });
    plot = new uPlot({
      ...size(),
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
      padding: [10, 14, 0, 0],
      scales: { x: { time: false, range: x.range }, y: { range: y.range, distr: y.log ? 3 : 1 } },
      axes: [
        { ...axis, grid: { show: false }, label: x.label, size: 26, labelSize: 22, labelGap: 0, values: (_, ticks) => ticks.map(x.format || String), incrs: x.incrs, space: 60 },
        { ...axis, size: 52, label: y.label, labelSize: 20, splits: y.log ? decades : undefined, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : (y.format || String)(tick))), space: 36 },
      ],
      series: series.map(({ line, hidden }) => line && ({
        stroke: hidden ? "transparent" : color(line.color),
        width: hidden ? 0 : line.width || 2,
        dash: line.dash,
        paths: line.bars && !hidden ? bars : line.stepped ? stepped : undefined,
        fill: line.bars ? `color-mix(in srgb, ${color(line.color)} 30%, transparent)` : undefined,
        points: { show: Boolean(line.points) && !hidden, size: 7, fill: color(line.color) },
        spanGaps: true,
      }) || {}),
      bands: areas.map(({ series, line }) => ({ series, fill: `color-mix(in srgb, ${color(line.color)} 16%, transparent)` })),
      hooks: {
        setCursor: [(chart) => {
          const at = chart.cursor.idx;
          for (const [place, output] of readings) {
            const value = at === null || at === undefined ? null : values[place][at];
            output.textContent = value === null || value === undefined ? "" : ` ${(y.reading || significant)(value)} at ${(x.reading || significant)(values[0][at])}`;
          }
        }],
      },
    }, values, holder);
  }
  draw();
  redraws.push(draw);
  new ResizeObserver(() => plot.setSize(size())).observe(holder);
}

// One small chart for each domain, all on the same scales. Panels: [{title, note, lines: [{color, values, low, high}]}].
function multiples(target, { x, y, panels, start, end }) {
  const [left, right] = [x[0], x[x.length - 1]];
  const scale = y.log ? Math.log10 : (value) => value;
  const [bottom, top] = y.range.map(scale);
  const across = (value) => (right > left ? 100 * (value - left) / (right - left) : 50);
  const up = (value) => 60 - 60 * (Math.min(Math.max(scale(Math.max(value, y.log ? 1e-12 : -Infinity)), bottom), top) - bottom) / (top - bottom);
  const path = (values) => {
    const points = values.map((value, i) => (value === null ? null : `${across(x[i]).toFixed(2)} ${up(value).toFixed(2)}`)).filter(Boolean);
    return points.length ? `M${points.join("L")}` : "";
  };
  target.replaceChildren(element("div", { class: "multiples" }, panels.map(({ title, note, lines }) => {
    const drawing = shape("svg", { viewBox: "0 0 100 60", preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${note}` });
    for (const tick of y.ticks) drawing.append(shape("line", { class: "rule", x1: 0, x2: 100, y1: up(tick), y2: up(tick) }));
    for (const line of lines) {
      const style = (name) => `${name}: var(${line.color})`;
      if (line.low) drawing.append(shape("path", { class: "area", style: style("fill"), d: `${path(line.high)}L${path([...line.low]).slice(1).split("L").reverse().join("L")}Z` }));
      drawing.append(shape("path", { class: "line", style: style("stroke"), d: path(line.values) }));
    }
    const labels = y.ticks.map((tick) => element("span", { style: `top: ${(up(tick) / 0.6).toFixed(1)}%` }, (y.format || String)(tick)));
    return element("figure", { class: "panel" },
      element("figcaption", {}, element("b", {}, title), element("span", {}, note)),
      element("div", { class: "drawn" }, element("div", { class: "ticks", "aria-hidden": "true" }, labels), drawing),
      element("div", { class: "ends", "aria-hidden": "true" }, element("span", {}, start), element("span", {}, end)));
  })));
}

const SPAN = [-0.25, 1.5];
const atZ = (z) => 100 * (Math.min(Math.max(z, SPAN[0]), SPAN[1]) - SPAN[0]) / (SPAN[1] - SPAN[0]);

function strip(...marks) {
  const guides = [0, 1].map((z) => shape("line", { class: "guide", x1: atZ(z), x2: atZ(z), y1: 0, y2: 20 }));
  return shape("svg", { class: "strip", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" }, guides, marks);
}

// All environments of a group: a tick each, the box of the middle half, the bar of the median.
function rug(values, name) {
  const sorted = [...values].sort((a, b) => a - b);
  const [low, middle, high] = [0.25, 0.5, 0.75].map((share) => atZ(quantile(sorted, share)));
  const ticks = [...new Set(sorted.map((z) => atZ(z).toFixed(1)))].map((at) => `M${at} 5V15`).join("");
  const stroke = `stroke: var(${name})`;
  return strip(
    shape("rect", { class: "box", style: `fill: var(${name})`, x: low, width: Math.max(high - low, 0.3), y: 3, height: 14 }),
    shape("path", { class: "rug", style: stroke, d: ticks }),
    shape("line", { class: "median", style: stroke, x1: middle, x2: middle, y1: 1, y2: 19 }));
}

// z on its interval; an arrow shows what lies beyond the edge. Marks: [{z, low, high, color}].
function interval(marks) {
  const height = 20 / marks.length;
  return strip(...marks.flatMap(({ z, low, high, color: name }, i) => {
    const y = height * (i + 0.5), stroke = `stroke: var(${name})`;
    const beyond = z < SPAN[0] ? -1 : z > SPAN[1] ? 1 : 0;
    const dot = beyond
      ? shape("path", { class: "arrow", style: stroke, d: `M${atZ(z) - 2 * beyond} ${y - 4}L${atZ(z)} ${y}L${atZ(z) - 2 * beyond} ${y + 4}` })
      : shape("line", { class: "dot", style: stroke, x1: atZ(z), x2: atZ(z), y1: y, y2: y + 0.001 });
    return [shape("line", { class: "whisker", style: stroke, x1: atZ(low ?? SPAN[0]), x2: atZ(high ?? SPAN[1]), y1: y, y2: y }), dot];
  }));
}

function zScale() {
  return element("div", { class: "scale", "aria-hidden": "true" },
    [0, 0.5, 1].map((z) => element("span", { style: `left: ${atZ(z)}%` }, String(z))));
}

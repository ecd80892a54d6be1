"use strict";
// Scatter plot, training curves and the tooltip; page.js calls them.
const FLOAT = "#222222", OTHER = "#9aa5b1";
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b"];
const AXES = { size_kb: "file size, KB", latency_ms: "latency, ms", seconds: "time of the run, s" };

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function ticks(low, high, count) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count)), ratio = (high - low) / count / step;
  const wide = step * (ratio > 5 ? 10 : ratio > 2 ? 5 : ratio > 1 ? 2 : 1), found = [];
  for (let i = Math.ceil(low / wide); i * wide <= high + wide * 1e-9; i++) found.push(Number((i * wide).toPrecision(12)));
  return found;
}

function scale(values, from, to, { log = false, flip = false } = {}) {
  let low = Math.min(...values), high = Math.max(...values);
  if (!(low <= high)) [low, high] = [0, 1];
  const turn = log ? Math.log10 : x => x, room = (turn(high) - turn(low)) * 0.06 || Math.abs(turn(low)) * 0.01 || 1;
  const [a, b] = [turn(low) - room, turn(high) + room], [start, end] = flip ? [to, from] : [from, to];
  const at = x => start + (turn(x) - a) / (b - a) * (end - start);
  if (!log) at.ticks = ticks(a, b, 5);
  else at.ticks = [...Array(12).keys()].flatMap(i => [1, 2, 5].map(m => m * 10 ** (i - 4))).filter(x => turn(x) > a && turn(x) < b);
  return at;
}

function axes(svg, xTitle, yTitle, xs, ys, { log = false, flip = false } = {}) {
  const { width, height } = svg.getBoundingClientRect(), box = { left: 62, right: width - 12, top: 10, bottom: height - 40 };
  svg.replaceChildren();
  const x = scale(xs, box.left, box.right, { log }), y = scale(ys, box.bottom, box.top, { flip });
  for (const tick of x.ticks) {
    svg.append(draw("line", { x1: x(tick), x2: x(tick), y1: box.top, y2: box.bottom, stroke: "#eef1f4" }));
    svg.append(draw("text", { x: x(tick), y: box.bottom + 15, "text-anchor": "middle" }, tick));
  }
  for (const tick of y.ticks) {
    svg.append(draw("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), stroke: "#eef1f4" }));
    svg.append(draw("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick));
  }
  svg.append(draw("text", { class: "title", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xTitle));
  const middle = (box.top + box.bottom) / 2;
  svg.append(draw("text", { class: "title", transform: `translate(14 ${middle}) rotate(-90)`, "text-anchor": "middle" }, yTitle));
  return { x, y };
}

function palette(column) {
  const kinds = [...new Set(state.rows.map(row => row.data.cells[column]))].sort();
  const colours = new Map(), others = kinds.filter(kind => kind !== "float" && kind !== "-");
  if (others.length < kinds.length) kinds.filter(kind => !others.includes(kind)).forEach(kind => colours.set(kind, FLOAT));
  others.forEach((kind, i) => colours.set(kind, COLOURS[i] ?? OTHER));
  return colours;
}

function showScatter() {
  const xKey = $("x").value, yKey = $("y").value, column = Number($("colour").value), svg = $("scatter");
  const rows = state.visible.filter(row => (row.data.at[xKey] ?? null) !== null && row.data.at[yKey] !== null);
  const xs = rows.map(row => row.data.at[xKey]), ys = rows.map(row => row.data.at[yKey]);
  const higher = section().quality.higher, log = Math.min(...xs) > 0 && Math.max(...xs) > 20 * Math.min(...xs);
  const { x, y } = axes(svg, AXES[xKey] ?? "", $("y").selectedOptions[0].text, xs, ys, { log, flip: !higher });
  const colours = palette(column);
  state.points = rows.map(row => ({ row, x: x(row.data.at[xKey]), y: y(row.data.at[yKey]) }));

  // Up is better, and left is: the front rises from the left. A disturbed latency takes no part in it.
  const disturbed = xKey === "latency_ms" && rows.some(row => row.data.disturbed);
  let best = Infinity, path = "";
  for (const point of disturbed ? [] : [...state.points].sort((a, b) => a.x - b.x || a.y - b.y)) {
    if (point.y >= best) continue;
    path += path ? `H${point.x}V${point.y}` : `M${point.x} ${point.y}`;
    best = point.y;
  }
  if (path) svg.append(draw("path", { id: "front", d: path, fill: "none", stroke: "#7a8794", "stroke-dasharray": "4 3" }));
  for (const point of state.points) {
    const attributes = { cx: point.x, cy: point.y, r: 5, fill: colours.get(point.row.data.cells[column]), "fill-opacity": 0.75 };
    if (state.picked.has(point.row)) Object.assign(attributes, { stroke: "#000", "stroke-width": 1.5 });
    svg.append(draw("circle", attributes));
  }
  svg.append(draw("circle", { id: "ring", r: 9, fill: "none", stroke: "#000", "stroke-width": 2, visibility: "hidden" }));
  $("tooltip").hidden = true;
  const missing = state.visible.length - rows.length;
  const entries = [...colours].slice(0, COLOURS.length + 1).map(([kind, colour]) =>
    make("span", {}, swatch(colour), kind));
  $("plot-legend").replaceChildren(...entries, make("span", {}, disturbed ? "no front: a latency is marked !" : "- - front of these points"), ...(missing ? [make("span", {}, `${missing} without these figures not shown`)] : []));
}

function swatch(colour) {
  const found = make("span", { class: "swatch" });
  found.style.background = colour;
  return found;
}

function heat(row, event) {
  state.hot?.tr.classList.remove("hot");
  state.hot = row;
  const point = row && state.points.find(point => point.row === row), ring = $("ring");
  if (ring) ring.setAttribute("visibility", point ? "visible" : "hidden");
  if (point && ring) { ring.setAttribute("cx", point.x); ring.setAttribute("cy", point.y); }
  if (row) row.tr.classList.add("hot");
  if (row && event) showTooltip(event, row.data.name, section().columns.map((c, i) => [c.header, row.data.cells[i]]));
  else $("tooltip").hidden = true;
}

function showTooltip(event, title, pairs) {
  const list = pairs.filter(([, value]) => value !== "-" && value !== "").flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", {}, String(value))]);
  const tip = $("tooltip");
  tip.replaceChildren(make("b", {}, title), make("dl", {}, ...list));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
  tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
}

function nearest(svg, points, event, reach) {
  const { left, top } = svg.getBoundingClientRect();
  let best = null, least = reach ** 2;
  for (const point of points) {
    const distance = (point.x - event.clientX + left) ** 2 + (point.y - event.clientY + top) ** 2;
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}

const lineColour = index => [...COLOURS, FLOAT][index] ?? `hsl(${index * 47} 45% 55%)`;
let linePoints = [];

function showCurves(rows) {
  const index = $("series").value, svg = $("curves");
  const lines = rows.map((row, i) => ({ row, colour: lineColour(i), curve: row.data.curves[index] })).filter(line => line.curve);
  const known = section().curves.length > 0 && rows.length > 0;
  $("curve-controls").hidden = !known;
  linePoints = [];
  if (!lines.length) {
    svg.replaceChildren();
    if (known) svg.append(draw("text", { x: 8, y: 20 }, "none of the selected runs has this curve (a cached float model was trained in another run)"));
    return;
  }
  const { x, y } = axes(svg, "step", "", lines.flatMap(line => line.curve[0]), lines.flatMap(line => line.curve[1]));
  for (const { row, colour, curve: [steps, values] } of lines) {
    const points = steps.map((step, i) => ({ row, step, value: values[i], x: x(step), y: y(values[i]) }));
    linePoints.push(...points);
    svg.append(draw("polyline", { points: points.map(p => `${p.x},${p.y}`).join(" "), fill: "none", stroke: colour, "stroke-width": 1.5 }));
    if (points.length === 1) svg.append(draw("circle", { cx: points[0].x, cy: points[0].y, r: 3, fill: colour }));
  }
}


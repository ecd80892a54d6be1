"use strict";
// Scatter plot, training curves and the tooltip; page.js calls them.
const FLOAT = "#222222", OTHER = "#9aa5b1";
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b"];
const AXES = { size_kb: "file size, KB", kb_at_bits: "file size with weights at their bits, KB", latency_ms: "latency, ms", seconds: "time of the run, s" };

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
  const rows = xKey ? state.visible.filter(row => at(row, xKey) !== null && at(row, yKey) !== null) : [];
  const [xs, ys] = [xKey, yKey].map(key => rows.flatMap(row => ends(row, key)));
  const higher = section().quality.higher, log = Math.min(...xs) > 0 && Math.max(...xs) > 20 * Math.min(...xs);
  const title = AXES[xKey] ?? xKey, yTitle = $("y").selectedOptions[0].text;
  const { x, y } = axes(svg, title, yTitle, xs, ys, { log, flip: !higher });
  const colours = palette(column);
  state.points = rows.map(row => ({ row, x: x(at(row, xKey)), y: y(at(row, yKey)) }));

  const isLatency = xKey === "latency_ms", disturbed = isLatency && rows.some(row => row.data.disturbed);
  const path = disturbed || !(xKey in AXES) ? "" : stairs(frontOf(state.points, xKey, yKey));
  if (path) svg.append(draw("path", { id: "front", d: path, fill: "none", stroke: "#7a8794", "stroke-dasharray": "4 3" }));
  for (const point of state.points) {
    const { row } = point, colour = colours.get(row.data.cells[column]);
    for (const bar of errorBars(row, xKey, yKey, x, y)) svg.append(draw("path", { class: "bar", d: bar, stroke: colour }));
    const attributes = { cx: point.x, cy: point.y, r: 5, fill: colour, "fill-opacity": 0.75 };
    if (isLatency && row.data.disturbed) Object.assign(attributes, { "fill-opacity": 0.1, stroke: colour });
    if (state.picked.has(row)) Object.assign(attributes, { stroke: "#000", "stroke-width": 1.5 });
    svg.append(draw("circle", attributes));
  }
  svg.append(draw("circle", { id: "ring", r: 9, fill: "none", stroke: "#000", "stroke-width": 2, visibility: "hidden" }));
  $("tooltip").hidden = true;
  const missing = state.visible.length - rows.length;
  const entries = [...colours].slice(0, COLOURS.length + 1).map(([kind, colour]) =>
    make("span", {}, swatch(colour), kind));
  const notes = [
    path && "- - front of these points",
    disturbed && "no front: a latency is marked !, hollow here",
    rows.some(row => row.data.sd[yKey] ?? row.data.sd[xKey]) && "bars: ± standard deviation",
    missing && `${missing} without these figures not shown`,
  ];
  $("plot-legend").replaceChildren(...entries, ...notes.filter(Boolean).map(note => make("span", {}, note)));
}

// How far a row's figure reaches: a group's by its standard deviation.
function ends(row, key) {
  const mean = at(row, key), sd = row.data.sd[key] ?? 0;
  return [mean - sd, mean + sd];
}

function errorBars(row, xKey, yKey, x, y) {
  const [px, py] = [x(at(row, xKey)), y(at(row, yKey))], [[left, right], [low, high]] =
    [ends(row, xKey).map(x), ends(row, yKey).map(y)];
  return [
    row.data.sd[xKey] && `M${left} ${py}H${right}M${left} ${py - 4}v8M${right} ${py - 4}v8`,
    row.data.sd[yKey] && `M${px} ${low}V${high}M${px - 4} ${low}h8M${px - 4} ${high}h8`,
  ].filter(Boolean);
}

// As leaderboard/pareto.py: off the front is what another point beats clearly in one coordinate and
// is clearly beaten by in none. The best in a coordinate is always on it.
function frontOf(points, xKey, yKey) {
  const slack = Math.log1p(DATA.tolerances[xKey] ?? 0), cost = slack ? Math.log : x => x;
  const sign = section().quality.higher ? -1 : 1;
  const all = points.map(point => ({ point, a: cost(at(point.row, xKey)), b: sign * at(point.row, yKey) }))
    .sort((one, other) => one.a - other.a || one.b - other.b);
  const exact = [];
  for (const one of all) if (!exact.length || one.b < exact.at(-1).b) exact.push(one);
  const best = [exact[0], exact.at(-1)], beats = (other, one) => one.a - other.a >= -slack &&
    one.b >= other.b && (one.a - other.a > slack || one.b > other.b);
  return exact.filter(one => best.includes(one) || !exact.some(other => beats(other, one))).map(({ point }) => point);
}

// Up is better, and left is: the front rises from the left.
const stairs = points => points.map(({ x, y }, i) => i ? `H${x}V${y}` : `M${x} ${y}`).join("");

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

// The scatter's colours where they tell the rows apart.
function lineColours(rows) {
  const column = Number($("colour").value), colours = palette(column);
  const own = rows.map(row => colours.get(row.data.cells[column]));
  return new Set(own).size === rows.length ? own : rows.map((_, i) => [...COLOURS, FLOAT][i] ?? `hsl(${i * 47} 45% 55%)`);
}
let linePoints = [];

function showCurves(rows) {
  const index = $("series").value, svg = $("curves"), colours = lineColours(rows);
  const lines = rows.flatMap((row, i) => runsOf(row.data)
    .map(run => ({ name: run.name, colour: colours[i], curve: run.curves[index] })).filter(line => line.curve));
  const known = $("series").options.length > 0 && rows.length > 0;
  $("curve-controls").hidden = !known;
  svg.toggleAttribute("hidden", !known);
  linePoints = [];
  if (!lines.length) {
    svg.replaceChildren();
    if (known) svg.append(draw("text", { x: 8, y: 20 }, "none of the selected runs has this curve (a cached float model was trained in another run)"));
    return;
  }
  const { x, y } = axes(svg, "step", "", lines.flatMap(line => line.curve[0]), lines.flatMap(line => line.curve[1]));
  for (const { name, colour, curve: [steps, values] } of lines) {
    const points = steps.map((step, i) => ({ name, step, value: values[i], x: x(step), y: y(values[i]) }));
    linePoints.push(...points);
    svg.append(draw("polyline", { points: points.map(p => `${p.x},${p.y}`).join(" "), fill: "none", stroke: colour, "stroke-width": 1.5 }));
    if (points.length === 1) svg.append(draw("circle", { cx: points[0].x, cy: points[0].y, r: 3, fill: colour }));
  }
}


"use strict";
// Text from the data goes into the page by textContent only; nothing is parsed as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MOST_COMPARED = 8, MOST_CURVES = 12;
const $ = id => document.getElementById(id);
const state = { section: 0, rows: [], visible: [], picked: new Set(), sort: null, points: [], hot: null };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- sections

const section = () => DATA.sections[state.section];

function open(index) {
  state.section = index;
  const { columns, rows, quality, unit, legend } = section();
  state.rows = rows.map((data, index) => ({ data, index, tr: tableRow(data, columns) }));
  state.rows.forEach(row => row.tr.addEventListener("click", event => event.target.closest("a") || toggle(row)));
  state.rows.forEach(row => row.tr.addEventListener("mouseenter", () => heat(row)));
  state.picked = new Set(rows.length <= MOST_COMPARED ? state.rows : []);
  state.sort = null;
  for (const button of $("sections").children) button.setAttribute("aria-pressed", button.dataset.index == index);
  $("tabs").value = index;
  $("filter").placeholder = `method=ptq,qat  bits=8  ${quality.name}>0.5  any text`;
  const quantity = quality.name + (quality.unit && `, ${quality.unit}`);
  const xs = xAxes();
  options($("x"), xs);
  $("x").value = (xs.find(([key]) => varies(key)) ?? xs[0])?.[0] ?? "";
  options($("y"), [["quantized", quantity], ["difference", "difference to float"]]);
  options($("colour"), columns.flatMap((c, i) => c.numeric || c.key === "front" ? [] : [[i, c.header]]));
  const method = columns.findIndex(c => c.key === "method");
  if (method >= 0) $("colour").value = method;
  const known = new Set(rows.flatMap(row => runsOf(row).flatMap(run => Object.keys(run.curves))));
  options($("series"), DATA.curves.map((name, i) => [i, name]).filter(([i]) => known.has(String(i))));
  $("legend").replaceChildren(...legend.map(line => make("div", {}, line)));
  tableHead(columns, unit === "run" ? "folder" : "group");
  filter();
}

const runsOf = data => data.runs.map(place => DATA.runs[place]);

// What a row has at an axis: a figure, or a setting that differs between rows and is a number.
function at(row, key) {
  if (key in row.data.at) return row.data.at[key];
  const { values, rows } = section().config[key], text = values[rows[row.index]];
  return isNumber(text) ? Number(text) : null;
}

const isNumber = text => text.trim() !== "" && Number.isFinite(Number(text));

function xAxes() {
  const figures = Object.entries(AXES).filter(([key]) => state.rows.some(row => row.data.at[key] !== null));
  const settings = Object.entries(section().config)
    .filter(([, { values }]) => values.filter(isNumber).length > 1).map(([key]) => [key, key]);
  const time = figures.findIndex(([key]) => key === "seconds");  // which always varies, and so comes last
  return [...figures.slice(0, time), ...settings, ...figures.slice(time)];
}

function varies(key) {
  const found = state.rows.map(row => at(row, key)).filter(value => value !== null);
  return Math.max(...found) > Math.min(...found) * (1 + (DATA.tolerances[key] ?? 0));
}

function options(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
}

// ---------------------------------------------------------------- table

function tableHead(columns, first) {
  const cells = columns.map((column, index) => {
    const button = make("button", {}, column.header);
    button.addEventListener("click", () => sortBy(index));
    return make("th", column.numeric ? { class: "number" } : {}, button);
  });
  $("table").tHead.replaceChildren(make("tr", {}, make("th", {}, first), ...cells));
}

function tableRow(data, columns) {
  const cells = columns.map((column, i) => make("td", column.numeric ? { class: "number" } : {}, data.cells[i]));
  const [run, ...more] = runsOf(data);
  const name = more.length ? data.name : make("a", { href: run.link }, data.name);
  const first = make("td", { title: more.length ? data.name : run.link }, name);
  return make("tr", data.front ? { class: "front" } : {}, first, ...cells);
}

function sortBy(index) {
  const descending = state.sort?.index === index ? !state.sort.descending : false;
  state.sort = { index, descending };
  [...$("table").tHead.rows[0].cells].forEach((th, i) => {
    if (i === index + 1) th.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  });
  showTable();
}

function ordered(rows) {
  if (!state.sort) return rows;
  const { index, descending } = state.sort, numeric = section().columns[index].numeric;
  const value = row => numeric ? row.data.numbers[index] : row.data.cells[index];
  const missing = row => { const found = value(row); return found === null || found === "-" || found === ""; };
  const compare = (a, b) => numeric ? value(a) - value(b) : value(a).localeCompare(value(b), "en", { numeric: true });
  return [...rows].sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : descending ? compare(b, a) : compare(a, b)));
}

function showTable() {
  $("table").tBodies[0].replaceChildren(...ordered(state.visible).map(row => row.tr));
}

// ---------------------------------------------------------------- filter

function values(row, name) {
  const { columns, config } = section(), key = DATA.aliases[name] ?? name, index = columns.findIndex(c => c.key === key);
  if (index >= 0) {
    const text = row.data.cells[index], number = row.data.numbers[index];
    const found = number === null ? [text] : [text, String(number)];
    if (key === "bits" && ["-", text.split("/")[0]].includes(text.split("/")[1])) found.push(text.split("/")[0]);
    return found;
  }
  return config[name] ? config[name].values[config[name].rows[row.index]].split(", ") : null;
}

function hint(key) {
  const { columns, config } = section();
  const names = [...new Set([...columns.map(c => c.key), ...Object.keys(DATA.aliases), ...Object.keys(config)])];
  const end = name => name.slice(name.lastIndexOf(".") + 1), most = Math.max(1, key.length / 4);
  const near = names.filter(name => Math.min(distance(key, name), distance(key, end(name))) <= most);
  return near.length ? `; nearest: ${near.slice(0, 5).join(", ")}` : "";
}

// The fewest letters to insert, remove or replace.
function distance(a, b) {
  let last = [...Array(b.length + 1).keys()];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++)
      row.push(Math.min(row[j - 1] + 1, last[j] + 1, last[j - 1] + (a[i - 1] !== b[j - 1])));
    last = row;
  }
  return last[b.length];
}

function test(token) {
  const found = token.match(/^([^=<>]+)(=|<|>)(.+)$/);
  const has = text => text.toLowerCase().includes(token.toLowerCase());
  if (!found) return row => has(row.data.name) || row.data.cells.some(has);
  const [, key, sign, text] = found;
  if (state.rows.length && values(state.rows[0], key) === null)
    throw new Error(`no column or varying setting is called ${key}${hint(key)}`);
  const allowed = text.toLowerCase().split(","), same = (a, b) => a.toLowerCase() === b || (a !== "" && Number(a) === Number(b));
  if (sign === "=") return row => values(row, key).some(value => allowed.some(other => same(value, other)));
  return row => values(row, key).some(value => value !== "" && (sign === "<" ? Number(value) < text : Number(value) > text));
}

const count = ({ rows, unit }) => `${rows.length} ${unit}${rows.length === 1 ? "" : "s"}`;

function filter() {
  try {
    const tests = $("filter").value.split(/\s+/).filter(Boolean).map(test);
    state.visible = state.rows.filter(row => tests.every(passes => passes(row)));
    $("filter-error").textContent = "";
  } catch (error) {
    $("filter-error").textContent = error.message;
  }
  $("count").textContent = `${section().title}: ${state.visible.length} of ${count(section())}`;
  showTable();
  showScatter();
  showPicked();
}

// ---------------------------------------------------------------- selected runs

function toggle(row) {
  if (!state.picked.delete(row)) state.picked.add(row);
  showScatter();
  showPicked();
}

function pick(rows) {
  state.picked = new Set(rows);
  showScatter();
  showPicked();
}

function chosenRows() {
  return state.rows.filter(row => state.picked.has(row));
}

function showPicked() {
  for (const row of state.rows) row.tr.classList.toggle("picked", state.picked.has(row));
  const rows = chosenRows();
  $("chosen").textContent = `${rows.length} selected`;
  showDifferences(rows.slice(0, MOST_COMPARED), rows.length);
  showCurves(rows.slice(0, MOST_CURVES));
}

function showDifferences(rows, total) {
  const config = section().config;
  if (!rows.length) {
    $("differences").replaceChildren(make("p", { class: "hint" }, "Click rows or points: what differs between their settings, and their training curves, show here."));
    return;
  }
  const lines = Object.entries(config)
    .map(([key, { values, rows: indices }]) => [key, rows.map(row => values[indices[row.index]])])
    .filter(([, found]) => new Set(found).size > 1);
  const note = total > rows.length ? `the first ${rows.length} of ${total}; ` : "";
  const text = lines.length ? "settings that differ" : rows.length > 1 ? "their settings are the same" : "select another one to see what differs";
  const colours = lineColours(rows);
  const head = rows.map((row, i) => make("th", { title: row.data.name }, swatch(colours[i]), row.data.name));
  const links = rows.map(row => make("td", { class: "runs" }, make("div", {}, ...runsOf(row.data)
    .flatMap(run => [make("a", { href: run.link, title: run.link }, run.name), " "]))));
  const runs = section().unit === "group" ? [make("tr", {}, make("td", {}, "runs"), ...links)] : [];
  const body = lines.map(([key, found]) => make("tr", {}, make("td", {}, key), ...found.map(value =>
    make("td", { title: value, ...(value === found[0] ? { class: "common" } : {}) }, value))));
  $("differences").replaceChildren(make("p", { class: "hint" }, note + text),
    make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, ""), ...head)), make("tbody", {}, ...runs, ...body)));
}

// ---------------------------------------------------------------- start

function showFailures() {
  const failures = DATA.failures.map(run => make("li", {}, make("a", { href: run.link }, run.name), ": ",
    make("span", { class: "error" }, run.error), run.overrides.length ? ` [${run.overrides.join(" ")}]` : ""));
  const skipped = DATA.unreadable.map(line => make("li", {}, `skipped ${line}`));
  if (failures.length + skipped.length)
    $("failures").append(make("h2", {}, `${failures.length + skipped.length} without a result`), make("ul", {}, ...failures, ...skipped));
}

if (DATA.sections.length > 1) {
  const titles = DATA.sections.map(found => `${found.title} (${count(found)})`);
  options($("tabs"), titles.map((title, index) => [index, title]));
  $("tabs").className = "several";
  $("tabs").addEventListener("change", event => open(Number(event.target.value)));
  $("sections").append(...titles.map((title, index) => {
    const button = make("button", { "data-index": index }, title);
    button.addEventListener("click", () => open(index));
    return button;
  }));
}
showFailures();
if (DATA.sections.length) {
  let waiting;  // fast typing is filtered by once a frame
  $("filter").addEventListener("input", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(filter); });
  for (const id of ["x", "y", "colour"]) $(id).addEventListener("change", showScatter);
  $("series").addEventListener("change", () => showCurves(chosenRows().slice(0, MOST_CURVES)));
  $("clear").addEventListener("click", () => pick([]));
  $("pick-front").addEventListener("click", () => pick(state.visible.filter(row => row.data.front)));
  const scatter = $("scatter"), curves = $("curves");
  scatter.addEventListener("mousemove", event => heat(nearest(scatter, state.points, event, 24)?.row ?? null, event));
  scatter.addEventListener("mouseleave", () => heat(null));
  scatter.addEventListener("click", event => { const point = nearest(scatter, state.points, event, 24); if (point) toggle(point.row); });
  curves.addEventListener("mousemove", event => {
    const point = nearest(curves, linePoints, event, 30);
    if (point) showTooltip(event, point.name, [["step", point.step], [$("series").selectedOptions[0].text, point.value]]);
    else $("tooltip").hidden = true;
  });
  curves.addEventListener("mouseleave", () => { $("tooltip").hidden = true; });
  $("table").tBodies[0].addEventListener("mouseleave", () => heat(null));
  addEventListener("resize", () => { showScatter(); showPicked(); });
  open(0);
} else for (const card of document.querySelectorAll(".card, header label")) card.hidden = true;

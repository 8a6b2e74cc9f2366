// What is on the page at a stage of a step of descent in a language; all of it is drawn anew.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { stage: 0, frame: 0, language: data.language };
const $ = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);

function say(english, values = {}) {
  const known = state.language === "ko" ? data.korean[english] : english;
  return known.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

let stages = [];

function draw() {
  const frame = data.frames[state.frame];
  stages = stagesOf(data, frame, say);
  const stage = stages[state.stage];
  document.documentElement.lang = state.language;
  document.title = say("Backpropagation, one number at a time");
  for (const node of all("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of all("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
  for (const node of all("[data-language]")) node.setAttribute("aria-pressed", node.dataset.language === state.language);
  $("title").textContent = stage.title;
  $("sentence").textContent = stage.sentence;
  $("formula").replaceChildren(...stage.lines);
  $("table").replaceChildren(...(stage.table ? [stage.table] : []));
  $("panel").className = `panel ${stage.way}`;
  $("panel").dataset.key = stage.key;
  $("spoken").textContent = `${stage.title}. ${stage.spoken}`;
  slide("stage", state.stage, stages.length, stage.title);
  slide("frame", state.frame, data.frames.length);
  $("previous").disabled = state.stage === 0 && state.frame === 0;
  $("next").disabled = state.stage === stages.length - 1 && state.frame === data.frames.length - 1;
  $("frame-previous").disabled = state.frame === 0;
  $("frame-next").disabled = state.frame === data.frames.length - 1;
  light(stage);
  keepInView();
  write(frame);
  curve();
}

function slide(id, at, length, spoken = "") {
  const count = say("{i} of {n}", { i: at + 1, n: length });
  $(id).max = length - 1;
  $(id).value = at;
  $(id).setAttribute("aria-valuetext", [count, spoken].filter(Boolean).join(": "));
  $(`${id}-count`).textContent = count;
}

function light({ lit, way }) {
  $("network").setAttribute("class", way);
  const toError = lit.toError ?? new Set();
  for (const node of all("#network .node")) {
    node.classList.toggle("lit", lit.units.has(node.dataset.unit) || lit.source === node.dataset.unit);
    node.classList.toggle("main", lit.main === node.dataset.unit);
  }
  for (const edge of all("#network .edge, #network .label")) {
    const { weight, source } = edge.dataset;
    edge.classList.toggle("lit", weight ? lit.weights.has(weight) : toError.has(source));
    edge.classList.toggle("main", Boolean(weight) && (lit.main === weight || (way === "forward" && lit.main !== undefined && lit.weights.has(weight))));
  }
}

// Where the drawing is wider than the screen.
function keepInView() {
  const [box, node] = [document.querySelector(".drawing"), document.querySelector("#network .node.main, #network .node.lit")];
  if (!node || box.scrollWidth <= box.clientWidth) return;
  const [outer, inner] = [box.getBoundingClientRect(), node.getBoundingClientRect()];
  box.scrollLeft += (inner.left + inner.right - outer.left - outer.right) / 2;
}

// The numbers in the drawing: those that the walk has come to, and no others.
function write(frame) {
  const here = stages[state.stage];
  const done = stages.slice(0, state.stage + 1);
  const reached = new Set(done.map((stage) => stage.reached).filter(Boolean));
  const passed = new Set(done.filter((s) => s.way === "forward").map((s) => s.key.replace("forward ", "")));
  const number = (node, n) => {
    node.textContent = n === undefined ? "" : drawn(n);
    if (n === undefined) delete node.dataset.value;
    else node.dataset.value = String(n);
  };
  const outputs = data.stages[data.stages.length - 1].units;
  const biases = Object.fromEntries(data.stages.flatMap((s) => s.biases.map((b, i) => [s.units[i].name, b])));
  const weight = (name) => frame.weights[name][here.updated ? 3 : 0];
  for (const node of all("#network .node")) {
    const name = node.dataset.unit;
    const unit = frame.units?.[name];
    if (name === "E") {
      number(node.querySelector(".value"), here.after ? frame.errorAfter : passed.has("error") ? frame.error : undefined);
      continue;
    }
    if (!data.unitByUnit) {
      const stage = frame.stages[data.stages.findIndex((s) => s.name === name)];
      if (node.querySelector("[data-layer]") && stage) node.querySelector("[data-layer]").textContent = layerName(name, say);
      const count = node.querySelector("[data-count]");
      if (count) count.textContent = say(count.dataset.count === "1" ? "{count} unit" : "{count} units", { count: count.dataset.count });
      continue;
    }
    const value = name in data.inputs ? data.inputs[name] : passed.has(name) ? (here.after ? unit.valueAfter : unit.value) : undefined;
    number(node.querySelector(".value"), value);
    const below = [...node.querySelectorAll(".below")];
    if (name in biases) below.shift().textContent = `${biases[name]} ${drawn(weight(biases[name]))}`;
    const target = outputs.find((u) => u.name === name)?.target;
    if (target !== undefined) below.shift().textContent = `${name.replace("o", "t")} ${drawn(target)}`;
    const arrived = reached.has(name) && !here.updated;
    node.querySelector(".derivative").textContent = arrived ? `∂ ${drawn(unit.dValue)}` : "";
  }
  for (const label of all("#network .label")) number(label.querySelector("tspan"), weight(label.dataset.weight));
}

const SVG = "http://www.w3.org/2000/svg";

function curve() {
  const points = data.curve.filter(([, error]) => error !== null);
  $("curve").hidden = points.length < 3;
  if (points.length < 3) return;
  const [left, right, top, bottom] = [62, 406, 14, 140];
  const last = data.curve[data.curve.length - 1][0];
  const most = Math.max(...points.map(([, error]) => error)) || 1;
  const x = (step) => left + ((right - left) * step) / last;
  const y = (error) => bottom - ((bottom - top) * error) / most;
  const path = points.map(([step, error], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(error).toFixed(1)}`).join("");
  const label = (at, height, anchor, words) => element(SVG, "text", { x: at, y: height, "text-anchor": anchor }, words);
  const frame = data.frames[state.frame];
  const after = stages[state.stage].after ? 1 : 0;
  const now = after ? frame.errorAfter : frame.error;
  $("curve").querySelector("svg").replaceChildren(
    element(SVG, "line", { x1: left, x2: right, y1: bottom, y2: bottom }),
    element(SVG, "line", { x1: left, x2: left, y1: top, y2: bottom }),
    element(SVG, "path", { d: path }),
    ...(now === null ? [] : [element(SVG, "circle", { cx: x(state.frame + after), cy: y(now), r: 6 })]),
    label(left - 8, y(most) + 5, "end", drawn(most)),
    label(left - 8, bottom + 5, "end", "0"),
    label(left, bottom + 22, "middle", "0"),
    label(right, bottom + 22, "end", String(last)),
  );
}

function go(stage, frame = state.frame) {
  const count = stages.length;
  if (stage < 0 && frame > 0) [stage, frame] = [count - 1, frame - 1];
  if (stage >= count && frame < data.frames.length - 1) [stage, frame] = [0, frame + 1];
  state.stage = Math.min(Math.max(stage, 0), count - 1);
  state.frame = Math.min(Math.max(frame, 0), data.frames.length - 1);
  draw();
}

$("previous").addEventListener("click", () => go(state.stage - 1));
$("next").addEventListener("click", () => go(state.stage + 1));
$("frame-previous").addEventListener("click", () => go(state.stage, state.frame - 1));
$("frame-next").addEventListener("click", () => go(state.stage, state.frame + 1));
$("stage").addEventListener("input", (event) => go(Number(event.target.value)));
$("frame").addEventListener("input", (event) => go(state.stage, Number(event.target.value)));
for (const button of all("[data-language]")) {
  button.addEventListener("click", () => {
    state.language = button.dataset.language;
    draw();
  });
}
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };
document.addEventListener("keydown", (event) => {
  const move = KEYS[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(state.stage + move[0], state.frame + move[1]);
});
draw();

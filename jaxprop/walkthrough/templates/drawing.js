// The drawing of the network, and the error curve.

function light({ lit, way }) {
  $("network").setAttribute("class", way);
  const toError = lit.toError ?? new Set();
  const labels = new Set(lit.labels ?? []);
  for (const node of all("#network .node")) {
    node.classList.toggle("lit", lit.units.has(node.dataset.unit) || lit.source === node.dataset.unit);
    node.classList.toggle("main", lit.main === node.dataset.unit);
  }
  for (const edge of all("#network .edge, #network .label")) {
    const { weight, source } = edge.dataset;
    edge.classList.toggle("lit", weight ? lit.weights.has(weight) : toError.has(source));
    edge.classList.toggle("main", Boolean(weight) && (lit.main === weight || (way === "forward" && labels.has(weight))));
    edge.classList.toggle("shown", labels.has(weight));
  }
}

// Where the drawing is larger than its box.
function keepInView({ lit }) {
  const [box, target] = [document.querySelector(".drawing"), drawnAs(lit.main)];
  if (!target) return;
  const [outer, inner] = [box.getBoundingClientRect(), target.getBoundingClientRect()];
  box.scrollBy((inner.left + inner.right - outer.left - outer.right) / 2, (inner.top + inner.bottom - outer.top - outer.bottom) / 2);
}

const nameAt = (event) => event.target.closest("[data-name]")?.dataset.name;
const drawnAs = (name) => document.querySelector(`#network [data-name="${name}"]`);

// The numbers in the drawing: those that the walk has come to, and no others.
function write(frame) {
  const here = stages[state.stage];
  const done = stages.slice(0, state.stage + 1);
  const reached = new Set(done.map((stage) => stage.reached).filter(Boolean));
  const passed = new Set(done.filter((s) => s.way === "forward").map((s) => s.key.replace("forward ", "")));
  number(drawnAs("E").querySelector(".value"), here.after ? frame.errorAfter : passed.has("error") ? frame.error : undefined);
  if (data.unitByUnit) {
    writeUnits(here, frame, passed, reached);
    writeWeights(here, frame);
  } else writeLayers();
}

function number(node, n) {
  node.textContent = n === undefined ? "" : drawn(n);
  if (n === undefined) delete node.dataset.value;
  else node.dataset.value = String(n);
}

function writeUnits(here, frame, passed, reached) {
  const outputs = new Set(data.stages[data.stages.length - 1].units.map((u) => u.name));
  const biases = Object.fromEntries(data.stages.flatMap((s) => s.biases.map((b, i) => [s.units[i].name, b])));
  for (const node of all("#network .node:not([data-unit=E])")) {
    const name = node.dataset.unit;
    const unit = frame.units[name];
    const value = name in state.values ? state.values[name] : passed.has(name) ? (here.after ? unit.valueAfter : unit.value) : undefined;
    number(node.querySelector(".value"), value);
    const below = [...node.querySelectorAll(".below")];
    const put = (what, n) => {
      const line = below.shift();
      line.dataset.name = what;
      line.textContent = `${what} ${drawn(n)}`;
      line.classList.toggle("main", here.lit.main === what);
    };
    if (name in biases) put(biases[name], frame.weights[biases[name]][here.updated ? 3 : 0]);
    if (outputs.has(name)) put(targetOf(name), state.values[targetOf(name)]);
    const arrived = reached.has(name) && !here.updated;
    node.querySelector(".derivative").textContent = arrived ? `∂ ${drawn(unit.dValue)}` : "";
  }
}

function writeWeights(here, frame) {
  const weight = (name) => frame.weights[name][here.updated ? 3 : 0];
  const largest = Math.max(...Object.keys(frame.weights).map((name) => Math.abs(weight(name)))) || 1;
  for (const label of all("#network .label")) number(label.querySelector(".number"), weight(label.dataset.weight));
  for (const edge of all("#network .edge[data-name]")) {
    edge.style.setProperty("--size", Math.abs(weight(edge.dataset.weight)) / largest);
  }
}

function writeLayers() {
  for (const name of all("#network [data-layer]")) {
    if (data.stages.some((stage) => stage.name === name.dataset.layer)) name.textContent = layerName(name.dataset.layer);
  }
  for (const count of all("#network [data-count]")) {
    const units = count.dataset.count;
    count.textContent = say(units === "1" ? "{count} unit" : "{count} units", { count: units });
  }
}

// A label that is hidden is shown while its weight is pointed at.
for (const [kind, near] of [["pointerover", true], ["pointerout", false]]) {
  $("network").addEventListener(kind, (event) => {
    document.querySelector(`#network .label[data-name="${nameAt(event)}"]`)?.classList.toggle("near", near);
  });
}

const SVG = "http://www.w3.org/2000/svg";

const finitePoints = (curve) => curve.filter(([, error]) => error !== null);

// Of values that were changed; faint beside it, that of the library's.
function curve(frame, after) {
  const points = finitePoints(state.curve);
  $("curve").hidden = points.length < 3;
  if (points.length < 3) return;
  const [left, right, top, bottom] = [62, 406, 14, 140];
  const last = state.curve[state.curve.length - 1][0];
  const before = state.curve === data.curve ? [] : finitePoints(data.curve).filter(([step]) => step <= last);
  const most = Math.max(...[...points, ...before].map(([, error]) => error)) || 1;
  const x = (step) => left + ((right - left) * step) / last;
  const y = (error) => bottom - ((bottom - top) * error) / most;
  const path = (points) => points.map(([step, error], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(error).toFixed(1)}`).join("");
  const label = (at, height, anchor, words) => element(SVG, "text", { x: at, y: height, "text-anchor": anchor }, words);
  const now = after ? frame.errorAfter : frame.error;
  $("curve").querySelector("svg").replaceChildren(
    element(SVG, "line", { x1: left, x2: right, y1: bottom, y2: bottom }),
    element(SVG, "line", { x1: left, x2: left, y1: top, y2: bottom }),
    element(SVG, "path", { class: "before", d: path(before) }),
    element(SVG, "path", { d: path(points) }),
    ...(now === null ? [] : [element(SVG, "circle", { cx: x(state.frame + (after ? 1 : 0)), cy: y(now), r: 6 })]),
    label(left - 8, y(most) + 5, "end", drawn(most)),
    label(left - 8, bottom + 5, "end", "0"),
    label(left, bottom + 22, "middle", "0"),
    label(right, bottom + 22, "end", String(last)),
  );
}

// Values that can be changed: picked by name or in the drawing, then typed, or dragged.

const editor = { name: "rate" };

const given = (name) => data.values[name];
const round = (number) => Number(number.toPrecision(12));

// The slider's range and step; anything may be typed.
function reach(name) {
  const size = Math.abs(given(name));
  const most = name === "rate" ? 4 * size || 1 : Math.max(1, Math.ceil(2 * size));
  const min = name === "rate" && given(name) >= 0 ? 0 : -most;
  return { min, max: most, step: (most - min) / 200 };
}

function change(name, number) {
  state.values = { ...state.values, [name]: number };
  computeAnew();
  draw();
}

// Values that are those of the library have its numbers; only others are computed here.
function computeAnew() {
  const last = data.curve[data.curve.length - 1][0];
  const own = () => descend(data.stages, state.values, data.frames.length, Math.min(last, 400));
  const { frames, curve } = changedNames().length ? own() : data;
  Object.assign(state, { frames, curve });
}

const changedNames = () => Object.keys(data.values).filter((name) => state.values[name] !== given(name));
const called = (name) => (name === "rate" ? say("learning rate") : name);

function choose(name) {
  editor.name = name;
  $("number").removeAttribute("aria-invalid");
  drawEditor();
}

function drawEditor() {
  if (!data.unitByUnit) return;
  const [number, drag, { name }] = [$("number"), $("drag"), editor];
  const value = state.values[name];
  $("name").value = name;
  Object.assign(drag, reach(name));
  drag.value = value;
  number.step = drag.step;
  if (document.activeElement !== number) number.value = value;
  drag.setAttribute("aria-valuetext", `${called(name)}: ${value}`);
  const names = changedNames();
  $("reset").disabled = names.length === 0;
  $("source").hidden = names.length > 0;
  $("changed").textContent = names.length
    ? say("Changed: {names}. All numbers are now computed in this page.", { names: names.map(called).join(", ") })
    : say("Weights and biases are those at the start of the descent.");
}

// In the words of the language.
function nameEditor() {
  const names = Object.keys(data.values);
  const option = (name) => element("", "option", { value: name }, called(name));
  const group = (label, members) => element("", "optgroup", { label }, ...members.map(option));
  $("name").replaceChildren(
    option("rate"),
    group(say("inputs"), names.filter((name) => name.startsWith("x"))),
    group(say("targets"), names.filter((name) => name.startsWith("t"))),
    ...data.stages.map((stage) => group(say("{layer} layer", { layer: layerName(stage.name) }), weightsOf([stage]))),
  );
}

$("name").addEventListener("change", (event) => choose(event.target.value));
$("drag").addEventListener("input", (event) => change(editor.name, round(event.target.valueAsNumber)));
$("number").addEventListener("input", ({ target }) => {
  const valid = Number.isFinite(target.valueAsNumber);
  target.setAttribute("aria-invalid", !valid);
  if (valid) change(editor.name, target.valueAsNumber);
});
$("number").addEventListener("blur", () => choose(editor.name));
$("reset").addEventListener("click", () => {
  state.values = { ...data.values };
  computeAnew();
  draw();
});

// A number in the drawing is dragged sideways by a mouse or a pen; a finger scrolls the drawing.
let held = null;
let dragged = false;
$("network").addEventListener("pointerdown", (event) => {
  const name = nameAt(event);
  dragged = false;
  if (event.pointerType !== "touch" && name in state.values) held = { name, from: state.values[name], x: event.clientX };
});
addEventListener("pointermove", (event) => {
  if (!held) return;
  const by = Math.round(event.clientX - held.x);
  if (!dragged && Math.abs(by) < 4) return;
  dragged = true;
  choose(held.name);
  change(held.name, round(held.from + by * reach(held.name).step));
});
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => (held = null));

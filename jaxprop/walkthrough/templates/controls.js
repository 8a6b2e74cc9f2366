// The way through the stages: by layer, by stage, by step of descent, by key, or by itself.

function layerTitle(group) {
  const [way, name] = group.split(" ");
  if (!name) return say({ error: "The error", update: "The update", after: "The new error" }[way]);
  const layer = layerName(name);
  return way === "forward" ? say("Forward through the {layer} layer", { layer }) : say("Back through the {layer} layer", { layer });
}

// A button for each layer on each way, in the words of the language.
function drawOutline() {
  const groups = [...new Set(stages.map((stage) => stage.group))];
  $("outline").replaceChildren(
    ...groups.map((group) => {
      const [way, name] = group.split(" ");
      const short = name ? `${way === "forward" ? "→" : "←"} ${layerName(name)}` : layerTitle(group);
      const kind = way === "backward" ? "backward" : "forward";
      const button = element("", "button", { type: "button", class: kind, "data-group": group, "aria-label": layerTitle(group) }, short);
      button.addEventListener("click", () => visit(stages.findIndex((stage) => stage.group === group)));
      return button;
    }),
  );
}

function drawControls(stage) {
  for (const button of all("#outline button")) {
    const here = button.dataset.group === stage.group;
    if (!here) button.removeAttribute("aria-current");
    else if (!button.hasAttribute("aria-current")) {
      button.setAttribute("aria-current", "step");
      $("outline").scrollLeft = button.offsetLeft - ($("outline").clientWidth - button.offsetWidth) / 2;
    }
  }
  pick(stage);
  slide("stage", state.stage, stages.length, stage.title);
  slide("frame", state.frame, state.frames.length);
  $("previous").disabled = state.stage === 0 && state.frame === 0;
  $("next").disabled = atEnd("stage");
  $("frame-previous").disabled = state.frame === 0;
  $("frame-next").disabled = atEnd("frame");
  for (const what of ["stage", "frame"]) {
    const playing = state.playing === what;
    $(`${what}-play`).textContent = playing ? "❚❚" : "▶";
    $(`${what}-play`).setAttribute("aria-label", playing ? say("Pause") : say("Play"));
  }
  $("spoken").setAttribute("aria-live", state.playing ? "off" : "polite");
}

// The stages of one layer, of which one is picked by name.
function pick({ group }) {
  const select = $("pick");
  const kept = `${group} ${state.language}`;
  if (select.dataset.kept !== kept) {
    const here = stages.flatMap((stage, i) => (stage.group === group ? [element("", "option", { value: i }, stage.key.split(" ").at(-1))] : []));
    select.replaceChildren(...here);
    select.dataset.kept = kept;
    select.hidden = here.length < 2;
  }
  select.value = state.stage;
}

function slide(id, at, length, spoken = "") {
  const count = say("{i} of {n}", { i: at + 1, n: length });
  $(id).max = length - 1;
  $(id).value = at;
  $(id).setAttribute("aria-valuetext", [count, spoken].filter(Boolean).join(": "));
  $(`${id}-count`).textContent = count;
}

const atEnd = (what) => state.frame === state.frames.length - 1 && (what === "frame" || state.stage === stages.length - 1);

function go(stage, frame = state.frame) {
  const count = stages.length;
  if (stage < 0 && frame > 0) [stage, frame] = [count - 1, frame - 1];
  if (stage >= count && frame < state.frames.length - 1) [stage, frame] = [0, frame + 1];
  state.stage = Math.min(Math.max(stage, 0), count - 1);
  state.frame = Math.min(Math.max(frame, 0), state.frames.length - 1);
  draw();
}

// Wherever somebody goes by hand, the playing ends.
function visit(stage, frame) {
  pause();
  go(stage, frame);
}

let timer;
function pause() {
  clearInterval(timer);
  state.playing = null;
}

function play(what) {
  const on = state.playing !== what;
  pause();
  if (on) {
    state.playing = what;
    const ahead = () => (what === "stage" ? go(state.stage + 1) : go(state.stage, state.frame + 1));
    if (atEnd(what)) go(what === "stage" ? 0 : state.stage, 0);
    timer = setInterval(() => {
      ahead();
      if (atEnd(what)) play(what);
    }, what === "stage" ? 1500 : 500);
  }
  draw();
}

$("previous").addEventListener("click", () => visit(state.stage - 1));
$("next").addEventListener("click", () => visit(state.stage + 1));
$("frame-previous").addEventListener("click", () => visit(state.stage, state.frame - 1));
$("frame-next").addEventListener("click", () => visit(state.stage, state.frame + 1));
$("stage").addEventListener("input", (event) => visit(Number(event.target.value)));
$("frame").addEventListener("input", (event) => visit(state.stage, Number(event.target.value)));
$("pick").addEventListener("change", (event) => visit(Number(event.target.value)));
for (const what of ["stage", "frame"]) $(`${what}-play`).addEventListener("click", () => play(what));
for (const button of all("[data-language]")) {
  button.addEventListener("click", () => {
    state.language = button.dataset.language;
    translate();
    draw();
  });
}
// A click on a name goes to its stage, on the way that the walk is on, and has its value ready to be
// changed.
$("network").addEventListener("click", (event) => {
  const name = nameAt(event);
  if (name === undefined || dragged) return;
  if (name in state.values) choose(name);
  const ways = stages[state.stage].way === "backward" ? ["backward", "arrival", "forward"] : ["forward", "backward"];
  const keys = [...ways.map((way) => `${way} ${name}`), ...(name === "E" ? ["error"] : [])];
  const at = keys.map((key) => stages.findIndex((stage) => stage.key === key)).find((i) => i >= 0);
  if (at !== undefined) visit(at);
});
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };
document.addEventListener("keydown", (event) => {
  const move = KEYS[event.key];
  if (!move || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.target.closest("select, .editor")) return; // there they choose and change values
  event.preventDefault();
  visit(state.stage + move[0], state.frame + move[1]);
});

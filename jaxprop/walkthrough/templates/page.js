// What is on the page at a stage of a step of descent in a language; all of it is drawn anew.

function draw() {
  const frame = state.frames[state.frame];
  stages = stagesOf(data, state.values, frame);
  const stage = stages[state.stage];
  $("title").textContent = stage.title;
  $("sentence").textContent = [stage.sentence, stage.note].filter(Boolean).join(" ");
  $("formula").replaceChildren(...stage.lines());
  $("table").replaceChildren(...(stage.table ? [stage.table()] : []));
  $("panel").className = `panel ${stage.way}`;
  $("panel").dataset.key = stage.key;
  $("spoken").textContent = `${stage.title}. ${stage.spoken}`;
  light(stage);
  write(frame);
  curve(frame, stage.after);
  drawControls(stage);
  drawEditor();
  keepInView(stage);
}

function translate() {
  document.documentElement.lang = state.language;
  document.title = say("Backpropagation, one number at a time");
  for (const node of all("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of all("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
  for (const node of all("[data-language]")) node.setAttribute("aria-pressed", node.dataset.language === state.language);
  stages = stagesOf(data, state.values, state.frames[state.frame]);
  drawOutline();
  nameEditor();
}

translate();
draw();

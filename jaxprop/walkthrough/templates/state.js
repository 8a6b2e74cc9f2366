// Where the page stands: at a stage of a step of descent, in a language, with values and their walk.

const data = JSON.parse(document.getElementById("data").textContent);
const state = {
  stage: 0,
  frame: 0,
  language: data.language,
  values: { ...data.values },
  frames: data.frames,
  curve: data.curve,
  playing: null,
};
let stages = [];

const $ = (id) => document.getElementById(id);
const all = (selector) => document.querySelectorAll(selector);

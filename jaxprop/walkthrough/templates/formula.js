// Numbers and formulas. A line of a formula is a list of parts, each a <math> of its own, so that
// it wraps on a narrow screen; `spoken` is the same line as a sentence.

function fixed(number) {
  if (number === null) return "—";
  const text = number.toFixed(8);
  if (text.length <= 11 && (Math.abs(number) >= 5e-9 || number === 0)) return text.replace("-", "−");
  return number.toExponential(4).replace("-", "−").replace("e-", "e−");
}

// Of a number that is itself an approximation, four digits.
function rounded(number) {
  return number === null ? "—" : number.toPrecision(4).replace(/-/g, "−");
}

function drawn(number) {
  if (number === null) return "—";
  const size = Math.abs(number);
  const text = size && (size < 1e-3 || size >= 1e4) ? number.toExponential(1) : number.toFixed(4);
  return text.replace(/-/g, "−");
}

function share(number) {
  if (number === null) return "";
  return number === 0 || number === 1 ? `${100 * number}%` : `${(100 * Math.min(Math.max(number, 0.001), 0.999)).toFixed(1)}%`;
}

const MATHML = "http://www.w3.org/1998/Math/MathML";

function element(space, name, attributes = {}, ...children) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const math = (name, ...children) => element(MATHML, name, {}, ...children);

// A name such as w12 is a letter with a subscript.
function named(name) {
  const [, letter, digits] = /^(\D+)(\d*)$/.exec(name);
  return digits ? math("msub", math("mi", letter), math("mn", digits)) : math("mi", letter);
}

const by = (above, below) =>
  math("mfrac", math("mrow", math("mo", "∂"), named(above)), math("mrow", math("mo", "∂"), named(below)));

// What an equation comes to; as a factor or a term, `value`, a negative number is in brackets.
function result(number, written = fixed) {
  return element(MATHML, "mn", { class: "value", "data-value": String(number) }, written(number));
}

function value(number, written = fixed) {
  const shown = result(number, written);
  return number < 0 ? math("mrow", math("mo", "("), shown, math("mo", ")")) : shown;
}

const sign = (text) =>
  element(MATHML, "mo", "()".includes(text) ? {} : { form: "infix", lspace: "0.2em", rspace: "0.2em" }, text);
const text = (words) => element(MATHML, "mtext", {}, words);

// Terms with a sign between them, each term a part of its own.
function joined(between, terms) {
  return terms.map((term, i) => (i ? [sign(between), ...term] : term));
}

function line(...parts) {
  const drawnLine = element("", "div", { class: "line" });
  for (const part of parts) {
    if (typeof part === "string") drawnLine.append(element("", "span", { class: "note" }, part));
    else drawnLine.append(element(MATHML, "math", { displaystyle: "true", lang: "en" }, math("mrow", ...part)));
  }
  return drawnLine;
}

function table(header, rows) {
  const head = element("", "tr", {}, ...header.map((cell) => element("", "th", { scope: "col" }, cell)));
  const body = rows.map(([first, ...cells]) =>
    element(
      "",
      "tr",
      {},
      element("", "th", { scope: "row" }, first),
      ...cells.map((cell) => (cell instanceof Node ? cell : element("", "td", {}, cell))),
    ),
  );
  return element("", "table", {}, element("", "thead", {}, head), element("", "tbody", {}, ...body));
}

const cell = (number, written = fixed) => {
  const attributes = number === null ? {} : { class: "value", "data-value": String(number) };
  return element("", "td", attributes, written(number));
};

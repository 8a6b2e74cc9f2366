// The page's own walk, for values that were changed: the same arithmetic as the library's.
//
// Every number has a name (x1, w1, b1, z1, h1, o1, t1), so a walk forward is one object of numbers
// by name, and a walk back another, of the derivatives of E by them.

const sigmoid = (z) => (z >= 0 ? 1 / (1 + Math.exp(-z)) : Math.exp(z) / (1 + Math.exp(z)));
const GELU = { c: Math.sqrt(2 / Math.PI), a: 0.044715 };
const geluTanh = (z) => Math.tanh(GELU.c * (z + GELU.a * z ** 3));

// value: a = f(z); back: dE/dz, given dE/da, z and a.
const ACTIVATIONS = {
  none: { value: (z) => z, back: (d) => d },
  sigmoid: { value: sigmoid, back: (d, z, a) => d * (a * (1 - a)) },
  tanh: { value: Math.tanh, back: (d, z, a) => d * ((1 + a) * (1 - a)) },
  relu: { value: (z) => Math.max(z, 0), back: (d, z) => (z > 0 ? d : 0) },
  gelu: {
    value: (z) => 0.5 * z * (1 + geluTanh(z)),
    back(d, far) {
      const z = Math.min(Math.max(far, -30), 30); // beyond, the slope is 0 or 1
      const t = geluTanh(z);
      return d * (0.5 * (1 + t) * (1 + z * (1 - t) * (GELU.c * (1 + 3 * GELU.a * z ** 2))));
    },
  },
  silu: {
    value: (z) => z * sigmoid(z),
    back(d, z) {
      const s = sigmoid(z);
      return d * (s * (1 + z * (1 - s)));
    },
  },
  softplus: { value: (z) => Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z))), back: (d, z) => d * sigmoid(z) },
};

const targetOf = (output) => output.replace("o", "t");
const weightsOf = (stages) => stages.flatMap((stage) => [...stage.weights.flat(), ...stage.biases]);

function walkForward(stages, values) {
  const n = { ...values, E: 0 };
  for (const { activation, inputs, units, weights, biases } of stages) {
    units.forEach(({ name, z }, i) => {
      n[z] = biases.length ? n[biases[i]] : 0;
      weights[i].forEach((w, j) => (n[z] += n[w] * n[inputs[j]]));
      n[name] = ACTIVATIONS[activation].value(n[z]);
    });
  }
  for (const { name } of stages[stages.length - 1].units) n.E += 0.5 * (n[targetOf(name)] - n[name]) ** 2;
  return n;
}

function walkBack(stages, n) {
  const d = {};
  for (const { name } of stages[stages.length - 1].units) d[name] = n[name] - n[targetOf(name)];
  for (const { activation, inputs, units, weights, biases } of [...stages].reverse()) {
    for (const name of inputs) d[name] = 0;
    units.forEach(({ name, z }, i) => {
      d[z] = ACTIVATIONS[activation].back(d[name], n[z], n[name]);
      if (biases.length) d[biases[i]] = d[z];
      weights[i].forEach((w, j) => {
        d[w] = d[z] * n[inputs[j]];
        d[inputs[j]] += d[z] * n[w];
      });
    });
  }
  return d;
}

// The first steps of the descent, as many as are shown, and the error curve of more of them.
function descend(stages, values, shown, steps) {
  const frames = [];
  const curve = [];
  const names = weightsOf(stages);
  let n = walkForward(stages, values);
  for (let step = 0; step < steps; step++) {
    const d = walkBack(stages, n);
    const next = { ...values };
    for (const w of names) next[w] = n[w] - values.rate * d[w];
    const after = walkForward(stages, next);
    curve.push([step, finite(n.E)]);
    if (step < shown) frames.push(frameOf(stages, n, d, after));
    n = after;
  }
  return { frames, curve: [...curve, [steps, finite(n.E)]] };
}

const finite = (number) => (Number.isFinite(number) ? number : null);

// A step of descent as the library writes it into the page, but for jax.grad: in its place there is
// a function, `quotient`, of a weight's name.
function frameOf(stages, n, d, after) {
  const [units, weights] = [{}, {}];
  for (const { activation, units: here } of stages) {
    for (const { name, z } of here) {
      const target = n[targetOf(name)];
      units[name] = {
        z: finite(n[z]),
        value: finite(n[name]),
        dValue: finite(d[name]),
        slope: finite(ACTIVATIONS[activation].back(1, n[z], n[name])),
        dZ: finite(d[z]),
        error: finite(0.5 * (target - n[name]) ** 2),
        valueAfter: finite(after[name]),
        errorAfter: finite(0.5 * (target - after[name]) ** 2),
      };
    }
  }
  for (const w of weightsOf(stages)) weights[w] = [finite(n[w]), finite(d[w]), null, finite(after[w])];
  return { error: finite(n.E), errorAfter: finite(after.E), units, weights, quotient: (w) => quotient(stages, n, w) };
}

// The central difference quotient; 0 where it is all rounding.
function quotient(stages, n, w) {
  const step = 6e-6 * Math.max(1, Math.abs(n[w]));
  const error = (weight) => walkForward(stages, { ...n, [w]: weight }).E;
  const difference = error(n[w] + step) - error(n[w] - step);
  return Math.abs(difference) <= 4 * Number.EPSILON * n.E ? 0 : finite(difference / (2 * step));
}

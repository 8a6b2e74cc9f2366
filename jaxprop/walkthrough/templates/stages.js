// The stages of one step of descent, in order: forward unit by unit, the error, back weight by
// weight, the update, the new error. Each has a key, the group that it is found in, its words, its
// formula (made when it is shown), and what it lights.

function stagesOf(data, values, frame) {
  return data.unitByUnit ? unitStages(data.stages, values, frame) : layerStages(data.stages, frame);
}

function unitStages(stages, values, frame) {
  const unit = (name) => frame.units[name];
  const output = stages[stages.length - 1];
  const before = (name) => (name in values ? values[name] : unit(name).value);
  const [OLD, PRODUCT, AUTO, NEW] = [0, 1, 2, 3];

  // Everything that the error crosses on its way back to a unit of that layer, the unit left out.
  function above(position, name) {
    const units = new Set(["E"]);
    const weights = new Set();
    const edges = new Set();
    if (position === stages.length - 1) edges.add(name);
    else {
      for (let i = position + 1; i < stages.length; i++) {
        stages[i].units.forEach((u, row) => {
          units.add(u.name);
          stages[i].weights[row].forEach((w, column) => {
            if (i > position + 1 || stages[i].inputs[column] === name) weights.add(w);
          });
        });
      }
      output.units.forEach((u) => edges.add(u.name));
    }
    return { units, weights, toError: edges };
  }

  function forward(stage, u, row) {
    const [weights, bias] = [stage.weights[row], stage.biases.slice(row, row + 1)];
    const names = () => [...weights.map((w, i) => [named(w), sign("·"), named(stage.inputs[i])]), ...bias.map((b) => [named(b)])];
    const numbers = () => [
      ...weights.map((w, i) => [value(frame.weights[w][OLD]), sign("·"), value(before(stage.inputs[i]))]),
      ...bias.map((b) => [value(frame.weights[b][OLD])]),
    ];
    const inner = () => (stage.activation === "none" ? [named(u.z)] : [text(stage.activation), sign("("), named(u.z), sign(")")]);
    return {
      key: `forward ${u.name}`,
      group: `forward ${stage.name}`,
      way: "forward",
      title: say("Forward to {unit}", { unit: u.name }),
      sentence: say("What comes in, each times its weight, is added up; the activation makes {unit} of it.", { unit: u.name }),
      lines: () => [
        line([named(u.z), sign("=")], ...joined("+", names())),
        line([sign("=")], ...joined("+", numbers()), [sign("="), result(unit(u.name).z)]),
        line([named(u.name), sign("="), ...inner()], [sign("="), result(unit(u.name).value)]),
      ],
      lit: { units: new Set(stage.inputs), weights: new Set(weights), main: u.name, labels: weights },
      spoken: `${u.z} = ${fixed(unit(u.name).z)}, ${u.name} = ${fixed(unit(u.name).value)}`,
    };
  }

  function errorStage(after) {
    const [valueOf, errorOf] = after ? ["valueAfter", "errorAfter"] : ["value", "error"];
    const total = after ? frame.errorAfter : frame.error;
    const half = () => math("mfrac", math("mn", "1"), math("mn", "2"));
    const squared = (...inside) => math("msup", math("mrow", sign("("), ...inside, sign(")")), math("mn", "2"));
    const fell = total !== null && frame.error !== null && total < frame.error;
    const outcome = fell
      ? "Forward again with the new weights: the error fell."
      : "Forward again with the new weights: the error did not fall.";
    const each = (u) =>
      line(
        [math("msub", math("mi", "E"), named(u.name)), sign("="), half(), squared(value(values[targetOf(u.name)]), sign("−"), value(unit(u.name)[valueOf]))],
        [sign("="), result(unit(u.name)[errorOf])],
      );
    const sum = () => joined("+", output.units.map((u) => [value(unit(u.name)[errorOf])]));
    return {
      key: after ? "after" : "error",
      group: after ? "after" : "error",
      way: "forward",
      title: say(after ? "The new error" : "The error"),
      sentence: say(after ? outcome : "Half the squared distance of each output from its target, added up."),
      lines: () => [
        ...output.units.map(each),
        line([named("E"), sign("=")], ...sum(), [sign("="), result(total)]),
        ...(after ? [line([result(frame.error), sign("→"), result(total)])] : []),
      ],
      lit: { units: new Set(output.units.map((u) => u.name)), weights: new Set(), main: "E", toError: new Set(output.units.map((u) => u.name)) },
      spoken: `E = ${fixed(total)}`,
      after,
    };
  }

  function arrival(position, u, column) {
    const next = stages[position + 1];
    const feeds = next.weights.map((weights) => weights[column]);
    const names = () => next.units.map((v, row) => [by("E", v.z), sign("·"), named(feeds[row])]);
    const numbers = () => next.units.map((v, row) => [value(unit(v.name).dZ), sign("·"), value(frame.weights[feeds[row]][OLD])]);
    return {
      key: `arrival ${u.name}`,
      group: `backward ${stages[position].name}`,
      way: "backward",
      title: say("Back to {unit}", { unit: u.name }),
      sentence: say("The error comes back to {unit} by every weight that it feeds.", { unit: u.name }),
      lines: () => [
        line([by("E", u.name), sign("=")], ...joined("+", names())),
        line([sign("=")], ...joined("+", numbers()), [sign("="), result(unit(u.name).dValue)]),
      ],
      lit: { ...above(position, u.name), main: u.name, labels: feeds },
      reached: u.name,
      spoken: `∂E/∂${u.name} = ${fixed(unit(u.name).dValue)}`,
    };
  }

  function backward(position, stage, u, w, source) {
    const [, product, auto] = frame.weights[w];
    const { dValue, slope } = unit(u.name);
    const last = source === null ? 1 : before(source);
    const lit = above(position, u.name);
    lit.units.add(u.name);
    const start = () =>
      line([by("E", u.name), sign("="), named(u.name), sign("−"), named(targetOf(u.name))], [sign("="), value(unit(u.name).value), sign("−"), value(values[targetOf(u.name)])], [sign("="), result(dValue)]);
    return {
      key: `backward ${w}`,
      group: `backward ${stage.name}`,
      way: "backward",
      title: say("Back to {weight}", { weight: w }),
      sentence: say("The chain rule along the lit path from the error to {weight}.", { weight: w }),
      lines: () => [
        ...(position === stages.length - 1 ? [start()] : []),
        line([by("E", w), sign("=")], [by("E", u.name)], [sign("·"), by(u.name, u.z)], [sign("·"), by(u.z, w)]),
        line([sign("="), value(dValue)], [sign("·"), value(slope)], [sign("·"), value(last)], [sign("="), result(product)]),
        frame.quotient
          ? line([sign("≈"), result(frame.quotient(w), rounded)], say("by a difference quotient"))
          : line([sign("="), result(auto)], say("by jax.grad")),
      ],
      lit: { ...lit, main: w, source, labels: [w] },
      reached: u.name,
      spoken: `∂E/∂${w} = ${fixed(dValue)} · ${fixed(slope)} · ${fixed(last)} = ${fixed(product)}`,
    };
  }

  function update() {
    const names = weightsOf(stages);
    return {
      key: "update",
      group: "update",
      way: "forward",
      title: say("The update"),
      sentence: say("Every weight goes down its slope by {rate} times its derivative.", { rate: values.rate }),
      lines: () => [line([math("mi", "w"), sign("←"), math("mi", "w"), sign("−"), value(values.rate, String), sign("·"), by("E", "w")])],
      table: () => table(
        [say("weight"), say("old"), "∂E/∂w", say("new")],
        names.map((w) => [w, cell(frame.weights[w][OLD]), cell(frame.weights[w][PRODUCT]), cell(frame.weights[w][NEW])]),
      ),
      lit: { units: new Set(), weights: new Set(names) },
      updated: true,
      spoken: names.length <= 12 ? names.map((w) => `${w} = ${fixed(frame.weights[w][NEW])}`).join(", ") : "",
    };
  }

  const made = stages.flatMap((stage) => stage.units.map((u, row) => forward(stage, u, row)));
  made.push(errorStage(false));
  for (let i = stages.length - 1; i >= 0; i--) {
    const stage = stages[i];
    if (i < stages.length - 1) made.push(...stage.units.map((u, column) => arrival(i, u, column)));
    stage.units.forEach((u, row) => {
      stage.weights[row].forEach((w, column) => made.push(backward(i, stage, u, w, stage.inputs[column])));
      if (stage.biases.length) made.push(backward(i, stage, u, stage.biases[row], null));
    });
  }
  made.push(update(), { ...errorStage(true), updated: true });
  made.find((stage) => stage.way === "backward").note = say("∂E/∂w is how fast the error E changes as w alone changes.");
  return made;
}

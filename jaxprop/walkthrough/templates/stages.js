// The stages of one step of descent, in order: forward unit by unit, the error, back weight by
// weight, the update, the new error. Each has a key, its words, its formula, and what it lights.

function stagesOf(data, frame, say) {
  return data.unitByUnit ? unitStages(data, frame, say) : layerStages(data, frame, say);
}

function unitStages(data, frame, say) {
  const { stages } = data;
  const unit = (name) => frame.units[name];
  const output = stages[stages.length - 1];
  const before = (name) => (name in data.inputs ? data.inputs[name] : unit(name).value);
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
    const terms = stage.weights[row].map((w, i) => [
      [named(w), sign("·"), named(stage.inputs[i])],
      [value(frame.weights[w][OLD]), sign("·"), value(before(stage.inputs[i]))],
    ]);
    if (stage.biases.length) {
      const b = stage.biases[row];
      terms.push([[named(b)], [value(frame.weights[b][OLD])]]);
    }
    const inner = stage.activation === "none" ? [named(u.z)] : [text(stage.activation), sign("("), named(u.z), sign(")")];
    return {
      key: `forward ${u.name}`,
      way: "forward",
      title: say("Forward to {unit}", { unit: u.name }),
      sentence: say("{unit} adds up what comes in, each times its weight; the activation makes its value of it.", { unit: u.name }),
      lines: [
        line([named(u.z), sign("=")], ...joined("+", terms.map(([names]) => names))),
        line([sign("=")], ...joined("+", terms.map(([, numbers]) => numbers)), [sign("="), result(unit(u.name).z)]),
        line([named(u.name), sign("="), ...inner], [sign("="), result(unit(u.name).value)]),
      ],
      lit: { units: new Set(stage.inputs), weights: new Set(stage.weights[row]), main: u.name },
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
    const lines = output.units.map((u) =>
      line(
        [math("msub", math("mi", "E"), named(u.name)), sign("="), half(), squared(value(u.target), sign("−"), value(unit(u.name)[valueOf]))],
        [sign("="), result(unit(u.name)[errorOf])],
      ),
    );
    lines.push(line([named("E"), sign("=")], ...joined("+", output.units.map((u) => [value(unit(u.name)[errorOf])])), [sign("="), result(total)]));
    if (after) lines.push(line([result(frame.error), sign("→"), result(total)]));
    return {
      key: after ? "after" : "error",
      way: "forward",
      title: say(after ? "The new error" : "The error"),
      sentence: say(after ? outcome : "Half the squared distance of each output from its target, added up."),
      lines,
      lit: { units: new Set(output.units.map((u) => u.name)), weights: new Set(), main: "E", toError: new Set(output.units.map((u) => u.name)) },
      spoken: `E = ${fixed(total)}`,
      after,
    };
  }

  function arrival(position, u, column) {
    const next = stages[position + 1];
    const terms = next.units.map((v, row) => {
      const w = next.weights[row][column];
      return [
        [by("E", v.z), sign("·"), named(w)],
        [value(unit(v.name).dZ), sign("·"), value(frame.weights[w][OLD])],
      ];
    });
    return {
      key: `arrival ${u.name}`,
      way: "backward",
      title: say("Back to {unit}", { unit: u.name }),
      sentence: say("The error comes back to {unit} by every weight that it feeds.", { unit: u.name }),
      lines: [
        line([by("E", u.name), sign("=")], ...joined("+", terms.map(([names]) => names))),
        line([sign("=")], ...joined("+", terms.map(([, numbers]) => numbers)), [sign("="), result(unit(u.name).dValue)]),
      ],
      lit: { ...above(position, u.name), main: u.name },
      reached: u.name,
      spoken: `∂E/∂${u.name} = ${fixed(unit(u.name).dValue)}`,
    };
  }

  function backward(position, stage, u, w, source) {
    const [old, product, auto, updated] = frame.weights[w];
    const { dValue, slope } = unit(u.name);
    const last = source === null ? 1 : before(source);
    const lit = above(position, u.name);
    lit.units.add(u.name);
    const first = [line([by("E", w), sign("=")], [by("E", u.name)], [sign("·"), by(u.name, u.z)], [sign("·"), by(u.z, w)])];
    if (position === stages.length - 1) {
      first.unshift(line([by("E", u.name), sign("="), named(u.name), sign("−"), named(u.name.replace("o", "t"))], [sign("="), value(unit(u.name).value), sign("−"), value(u.target)], [sign("="), result(dValue)]));
    }
    return {
      key: `backward ${w}`,
      way: "backward",
      title: say("Back to {weight}", { weight: w }),
      sentence: say("The chain rule along the lit path from the error to {weight}.", { weight: w }),
      lines: [
        ...first,
        line([sign("="), value(dValue)], [sign("·"), value(slope)], [sign("·"), value(last)], [sign("="), result(product)]),
        line([sign("="), result(auto)], say("by jax.grad")),
      ],
      lit: { ...lit, main: w, source },
      reached: u.name,
      spoken: `∂E/∂${w} = ${fixed(dValue)} · ${fixed(slope)} · ${fixed(last)} = ${fixed(product)}`,
    };
  }

  function update() {
    const names = stages.flatMap((s) => [...s.weights.flat(), ...s.biases]);
    return {
      key: "update",
      way: "forward",
      title: say("The update"),
      sentence: say("Every weight goes down its slope by {rate} times its derivative.", { rate: data.rate }),
      lines: [line([math("mi", "w"), sign("←"), math("mi", "w"), sign("−"), value(data.rate, String), sign("·"), by("E", "w")])],
      table: table(
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
  return made;
}

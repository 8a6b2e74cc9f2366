// The stages where there are too many units to draw: layer by layer, each array in a few numbers.

function layerStages(stages, frame) {
  const measures = ["mean", "rms", "largest", "zeros", "saturated"];

  function through(stage, position, way) {
    const rows = Object.entries(frame.stages[position][way]).filter(([, row]) => row);
    const layer = layerName(stage.name);
    const title = way === "forward" ? "Forward through the {layer} layer" : "Back through the {layer} layer";
    return {
      key: `${way} ${stage.name}`,
      group: `${way} ${stage.name}`,
      way,
      title: say(title, { layer }),
      sentence: say("What passes through the layer, in a few numbers."),
      lines: () => [],
      table: () => table(
        ["", ...rows.map(([what]) => say(what))],
        measures
          .map((measure, i) => [say(measure), ...rows.map(([, row]) => cell(row[i], i < 3 ? written : share))])
          .filter((_, i) => rows.some(([, row]) => row[i] !== null)),
      ),
      lit: { units: new Set(), weights: new Set(), main: stage.name },
      reached: way === "backward" ? stage.name : undefined,
      spoken: rows.map(([what, row]) => `${say(what)}: ${say("rms")} ${fixed(row[1])}`).join(", "),
    };
  }

  function errorStage(after) {
    const total = after ? frame.errorAfter : frame.error;
    const fell = total !== null && frame.error !== null && total < frame.error;
    const outcome = fell
      ? "Forward again with the new weights: the error fell."
      : "Forward again with the new weights: the error did not fall.";
    return {
      key: after ? "after" : "error",
      group: after ? "after" : "error",
      way: "forward",
      title: say(after ? "The new error" : "The error"),
      sentence: say(after ? outcome : "Half the squared distance of each output from its target, added up."),
      lines: () => [after ? line([result(frame.error), sign("→"), result(total)]) : line([named("E"), sign("="), result(total)])],
      lit: { units: new Set(), weights: new Set(), main: "E" },
      spoken: `E = ${fixed(total)}`,
      after,
    };
  }

  const written = (number) => (number === null ? "" : fixed(number));
  const back = stages.map((stage, i) => through(stage, i, "backward")).reverse();
  back[0].note = say("∂E/∂w is how fast the error E changes as w alone changes.");
  return [...stages.map((stage, i) => through(stage, i, "forward")), errorStage(false), ...back, errorStage(true)];
}

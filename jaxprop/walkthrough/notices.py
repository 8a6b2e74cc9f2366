"""What is wrong with a descent, in words: units that are stuck, overflow, divergence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from jaxprop.explanation.numerals import plain
from jaxprop.explanation.summary import SATURATED
from jaxprop.walkthrough.document import Walkthrough
from jaxprop.walkthrough.lines import layer
from jaxprop.walkthrough.words import Say

NAMED = 3  # most units that are listed by name


def notices(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield a paragraph on each thing that keeps the network from learning.

    Args:
        walk: the walkthrough.
        say: translates into the language.
    """
    before = {
        unit.name: row[0].slope
        for stage in walk.stages
        for unit, row in zip(stage.units, stage.weights, strict=True)
    }
    yield from _overflow(walk, say)
    yield from _stuck(walk, before, say)
    yield from _unmoved(walk, say)
    yield from _divergence(walk, say)
    if walk.final.nonfinite_after is None and walk.final.steps > 1:
        stuck = list(_stuck(walk, walk.final.slopes, say))
        if stuck != list(_stuck(walk, before, say)):
            for paragraph in stuck:
                yield say(
                    "After {steps} steps: {paragraph}",
                    steps=walk.final.steps,
                    paragraph=paragraph,
                )


def _overflow(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield a paragraph on the first number of the first step that is not finite."""
    numbers = [
        pair
        for stage in walk.stages
        for unit in stage.units
        for pair in ((unit.z_name, unit.z), (unit.name, unit.value))
    ]
    numbers += [("E", walk.error)]
    numbers += [(f"∂E/∂{w.name}", w.product) for s in reversed(walk.stages) for w in s.chains()]
    for name, number in numbers:
        if not math.isfinite(number):
            yield say(
                "{name} is {number}: overflow. The largest number of float64 is 1.8e+308, and "
                "what is computed from {name} is inf or nan as well. Try smaller inputs, targets "
                "or weights.",
                name=name,
                number=plain(number),
            )
            return


def _stuck(walk: Walkthrough, slopes: Mapping[str, float], say: Say) -> Iterator[str]:
    """Yield a paragraph on the units of each layer that let no error through, or hardly any."""
    for stage in walk.stages:
        flat = [u.name for u in stage.units if abs(slopes[u.name]) < SATURATED]
        if stage.activation == "none" or not flat:
            continue
        of = {"units": _named(flat, say), "count": f"{len(flat):,}"}
        of["all"] = f"{len(stage.units):,}"
        of |= {"layer": layer(stage.name, say), "activation": stage.activation}
        if stage.activation != "relu":
            yield say(
                "Saturated in the {layer} layer: {units} ({count} of {all}). There the slope of "
                "{activation} is below {least}, so that hardly any error comes back and their "
                "weights hardly move. Try smaller inputs or weights.",
                **of,
                least=SATURATED,
            )
        elif len(flat) < len(stage.units):
            yield say(
                "Dead for this example in the {layer} layer: {units} ({count} of {all}). Their z "
                "is not above 0, where relu is flat, so that no error comes back through them and "
                "their weights do not move.",
                **of,
            )
        else:
            yield say(
                "All units of the {layer} layer are dead: {units}. Their z is not above 0, where "
                "relu is flat, so that no error comes back through them: neither their weights nor "
                "any below them move. Try other weights or biases, or gelu in the place of relu; "
                "if they died on the way, a smaller learning rate.",
                **of,
            )


def _unmoved(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield a paragraph on a step that changes nothing."""
    if walk.config.learning_rate == 0:
        yield say("The learning rate is 0: no weight moves.")
    if all(weight.product == 0 for weight in walk.chains()):
        if walk.error == 0:
            yield say("E is 0: every output is its target, and nothing is left to learn.")
        else:
            yield say("Every derivative is 0: no weight moves, in this step or any other.")


def _divergence(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield a paragraph on an error that grows, or is no longer finite."""
    rate, final = walk.config.learning_rate, walk.final
    peak, highest = max(walk.curve, key=lambda point: point[1])
    if not math.isfinite(walk.error):
        return
    if final.nonfinite_after is not None:
        yield say(
            "The descent diverges: after step {step} E is no longer finite. Every step overshoots, "
            "the next one further, until the numbers are too large for float64 (1.8e+308).",
            step=final.nonfinite_after,
        )
    elif final.error > walk.error:
        before, after = plain(walk.error), plain(final.error)
        yield say("E grew from {before} to {after}.", before=before, after=after)
    elif highest > walk.error:
        yield say(
            "On the way E grew to {highest}, at step {peak}.", highest=plain(highest), peak=peak
        )
    else:
        return
    if rate < 0:
        yield say("The learning rate is negative, and every step goes uphill: make it positive.")
    else:
        yield say(
            "The steps are too long. Try a smaller learning rate, such as {rate}.",
            rate=plain(rate / 10),
        )


def _named(names: list[str], say: Say) -> str:
    first = ", ".join(names[:NAMED])
    left = len(names) - NAMED
    return say("{names} and {count} more", names=first, count=f"{left:,}") if left > 0 else first

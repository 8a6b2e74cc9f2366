"""The walkthrough as text for a terminal of 80 columns, or for a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from jaxprop.explanation.numerals import bracketed, fixed, given
from jaxprop.walkthrough import sections
from jaxprop.walkthrough.document import Walkthrough
from jaxprop.walkthrough.lines import INDENT, flow, layer, product
from jaxprop.walkthrough.notices import notices
from jaxprop.walkthrough.sections import READABLE, Most
from jaxprop.walkthrough.words import Language, words

Section = tuple[str, Iterable[str]]


def show(
    walk: Walkthrough, console: Console, language: Language = "en", most: Most = READABLE
) -> None:
    """Print the network, the forward pass, the backward pass through each layer, and the check.

    Args:
        walk: the walkthrough. With more than one step, the state after the last is printed too.
        console: the console to print to.
        language: the language of the text.
        most: how much to print of a large network. If some is left out, a table with a line for
            each layer is printed as well.
    """
    say, steps = words(language), walk.final.steps
    of_steps = say(" (step 1 of {steps})", steps=steps) if steps > 1 else ""
    stages = most.ends(walk.stages)
    printed: list[Section] = [(say("The network"), sections.network(walk, most, say))]
    if most.leaves_out_of(walk):
        printed.append((say("By layer") + of_steps, sections.by_layer(walk, most, say)))
    printed.append((say("Forward") + of_steps, sections.forward(walk, most, say)))
    for stage in reversed(stages):
        title = say("Back to the {layer} weights", layer=layer(stage.name, say)) + of_steps
        printed.append((title, sections.back(stage, most, say)))
    printed.append((say("The check") + of_steps, sections.check(walk, most, say)))
    if steps > 1:
        title = say("After {steps} steps", steps=steps)
        printed.append((title, sections.final(walk, most, say)))
    found = [line for text in notices(walk, say) for line in ("", *flow(text.split(), " "))]
    if found:
        printed.append((say("What stands out"), found[1:]))
    _print(console, printed)


def show_weight(walk: Walkthrough, name: str, console: Console, language: Language = "en") -> None:
    """Print the chain rule for one weight, and nothing else.

    Args:
        walk: the walkthrough.
        name: the weight's name.
        console: the console to print to.
        language: the language of the text.
    """
    stage, chain = next((s, w) for s in walk.stages for w in s.chains() if w.name == name)
    unit = next(unit for unit in stage.units if unit.name == chain.unit)
    say = words(language)
    rate, bias = bracketed(given(walk.config.learning_rate)), chain.source == "1"
    source = say("the bias") if bias else say("from {source}", source=chain.source)
    factors = [fixed(f) for f in (chain.d_value, chain.slope, chain.source_value)]
    margin = f"{'':{len(name) + 5}}"
    lines = [*sections.arrival(unit), ""] if unit.paths else []
    lines += [
        f"∂E/∂{name} = {sections.chain_rule(chain)}",
        f"{margin}= {product(factors, ' · ')}",
        f"{margin}= {fixed(chain.product)}   {say('by hand')}",
        f"{margin}= {fixed(chain.jax_grad)}   {say('by jax.grad')}",
        "",
        f"{say('new {name}', name=name)} = {given(chain.old)} − "
        f"{product([rate, fixed(chain.product)], ' · ')} = {fixed(chain.new)}",
    ]
    title = say(
        "{name}, {source} to {unit} ({layer} layer)",
        name=name,
        source=source,
        unit=chain.unit,
        layer=layer(stage.name, say),
    )
    _print(console, [(title, lines)])


def _print(console: Console, printed: Sequence[Section]) -> None:
    for index, (title, lines) in enumerate(printed):
        if index:
            console.print()
        console.print(Text(title, style="bold"), soft_wrap=True)
        for line in lines:
            console.print(Text(f"{'':{INDENT}}{line}" if line else ""), soft_wrap=True)

"""``jp.find_nonfinite``: the first non-finite array of a walk, and signs of trouble."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxprop.births.birth import Birth
from jaxprop.core.arrays import check_fit
from jaxprop.core.checks import check_not_empty
from jaxprop.core.combinator import seen_through
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.core.walk import check_net_and_loss
from jaxprop.explanation.births import Sought, Stop, birth, stopped
from jaxprop.explanation.numerals import share, short
from jaxprop.explanation.record import explain
from jaxprop.explanation.summary import Summary, summary
from jaxprop.explanation.terms import Explanation, by_name
from jaxprop.layers import Relu

WIDTH = 80
ROWS = 16  # with fewer rows a unit may be 0 for all of them by chance
DEAD, SATURATED = 0.1, 0.5  # fractions above which a layer is a suspect
EXPLODING, VANISHING = 1e3, 1e-4  # rms of a cotangent, relative to that of the loss's own

GRADIENT = "the gradient"

Phase = Literal["input", "forward", "loss", "backward"]
Place = tuple[Phase, str | None, str, Summary | None]
"""An array of the walk: the phase, the layer's name, the array's name, and its summary."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of ``jp.find_nonfinite``. It prints as sentences, and is false if all is finite.

    Attributes:
        phase: the part of the walk: "input" if x, the target or the params were not finite to begin
            with, else "forward", "loss" or "backward". None if all is finite.
        layer: the layer's name, as in ``jp.explain``; None if the array is not a layer's.
        array: the name of the array: x, y, ct, d_x, target, a param or its gradient. If it is one
            of several in a dict or a tuple, the name has its place there, such as "y['mean']".
        index: the index of its first element that is not finite.
        value: that element.
        example: the example that it belongs to; None for an array without an axis of examples.
        x: that example's input to the layer, or to the loss. None if ``example`` is None, or if the
            phase is "input".
        ct: that example's cotangent of the output; None in the same cases.
        birth: the equation that made it, inside the layer, the function or the loss, with its
            source line and the usual cause. None if it was not finite to begin with, if it arose
            between layers, or if no equation was found.
        sentence: all of this in words, except the birth.
        suspects: sentences on layers that are finite but in trouble.
    """

    phase: Phase | None
    layer: str | None
    array: str | None
    index: tuple[int, ...]
    value: float
    example: int | None
    x: PyTree = dataclasses.field(repr=False)
    ct: Cotangent = dataclasses.field(repr=False)
    birth: Birth | None
    sentence: str
    suspects: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.phase is not None

    def __str__(self) -> str:
        born = [] if self.birth is None else [str(self.birth)]
        lines = textwrap.fill(self.sentence, WIDTH), *born
        return "\n".join([*lines, *(textwrap.fill(each, WIDTH) for each in self.suspects)])


def find_nonfinite(
    net: Layer,
    loss: Loss,
    params: Params,
    x: PyTree,
    target: PyTree = None,
    *,
    key: Array | None = None,
    mask: Array | None = None,
) -> Finding:
    """Find the first element of a walk that is not finite.

    Call it with the batch at which training failed. It names the first layer with a non-finite
    result, the example and the element. Inside that layer, a ``jp.function`` or the loss, it names
    the equation that made the element of finite numbers: its source line, the step of a ``scan``,
    the numbers that came in, and the usual cause. To find the equation, that one layer is run again
    equation by equation, and a function is also differentiated equation by equation. Suspects are
    named too: units that are dead for the whole batch, saturated activations, and cotangents that
    explode or vanish from layer to layer.

    It looks at values, so it must be called outside ``jax.jit``.

    Args:
        net: the network.
        loss: the loss.
        params: the net's params.
        x: the inputs, with the example on axis 0. Leave out the examples that ``weights`` of 0 make
            padding in training: here each example counts.
        target: the targets, with the example on axis 0; omit it for a loss without a target.
        key: a key of ``jax.random.key``, for the layers that draw.
        mask: bool (N, T), True where a position is real, for the layers that take a mask.

    Returns:
        A ``Finding``, which is false if all is finite.

    Raises:
        TypeError: if net is not a layer, if loss is not a loss, or if an argument is a tracer.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> net, x = jp.chain(jp.Tanh(), jp.Dense(1)), jnp.array([[1.0], [2.0]], jnp.float32)
        >>> params = ((), jp.AffineParams(jnp.float32([[3e38]]), jnp.float32([3e38])))
        >>> found = jp.find_nonfinite(net, jp.HalfSquaredError(), params, x, x)
        >>> print(found)  # doctest: +ELLIPSIS
        On the way forward layer 1 Dense(1) gave inf: y[0, 0], of example 0. All before
        it was finite; the largest |x| of that example was 7.6e-01. Not finite in y: 2
        of 2.
        It was born in add at jaxprop/layers/dense.py:...:
            return (y if params.b is None else y + aligned(params.b, y)), x
        add was given 2.28478e+38 and 3e+38 and gave inf at [0, 0] of 2×1, of example 0.
        The result overflows: float32 goes to 3.4e+38.
    """
    check_net_and_loss(net, loss)
    check_not_empty("find_nonfinite", x)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, x, target))):
        raise TypeError("find_nonfinite looks at values: call it outside of jax.jit")
    check_fit({"x": x, "target": target})
    params = net.bind(params, key=key, mask=mask)
    with jax.debug_nans(False), jax.debug_infs(False):
        terms, of_x, of_target = jax.device_get(_walked(net, loss, params, x, target))
        suspects, walk = tuple(_suspects(terms)), (net, loss, params, x, target)
        for phase, layer, array, found in _in_order(terms, of_x, of_target):
            if found is not None and found.nonfinite:
                return _finding(phase, layer, array, found, suspects, walk)
    sentence = "All is finite: x, params, the way forward, the loss and the way back."
    return Finding(None, None, None, (), 0.0, None, None, None, None, sentence, suspects)


def _in_order(
    terms: Explanation, of_x: Summary | None, of_target: Summary | None
) -> Iterator[Place]:
    """Yield every array of the walk, in the order in which they were computed."""
    runs = terms.runs()
    yield "input", None, "x", of_x
    yield "input", None, "target", of_target
    for name, at in runs:
        for params in (at.summaries.params, at.summaries.unlearned):
            for param, each in by_name(params, Summary).items():
                yield "input", name, f"params {param}".strip(), each
    for name, at in runs:
        yield "forward", name, "x", at.summaries.x
        yield "forward", name, "y", at.summaries.y
    yield "loss", None, "x", terms.loss.summaries.x
    yield "loss", None, "y", terms.loss.summaries.y
    yield "loss", None, "d_x", terms.loss.summaries.d_x
    for name, at in reversed(runs):
        yield "backward", name, "ct", at.summaries.ct
        first = name == runs[0][0]  # nothing else is computed from the first layer's d_x
        if not first:
            yield "backward", name, "d_x", at.summaries.d_x
        for param, each in by_name(at.summaries.grads, Summary).items():
            yield "backward", name, f"{GRADIENT} by {param}".removesuffix(" by "), each
        if first:
            yield "backward", name, "d_x", at.summaries.d_x


def _finding(
    phase: Phase,
    layer: str | None,
    array: str,
    found: Summary,
    suspects: tuple[str, ...],
    walk: tuple[Layer, Loss, Params, PyTree, PyTree],
) -> Finding:
    (part, index), value = found.place_of_first(), float(found.value)
    has_examples = array in ("x", "y", "ct", "d_x", "target") and bool(index)
    example = index[0] if has_examples else None
    x = ct = stop = None
    of_loss = phase == "loss"
    title = "the loss" if of_loss else "" if layer is None else f"layer {layer}".strip()
    if phase != "input":
        stop = stopped(None if of_loss else layer, *walk)
        title = f"the loss, {stop.layer}," if of_loss else f"{title} {seen_through(stop.layer)}"
        if example is not None:
            each = jax.device_get((stop.x, stop.ct))
            x, ct = jax.tree.map(lambda leaf: leaf[example], each)
    place = f"[{', '.join(map(str, index))}]" if index else ""
    of = "" if example is None else f", of example {example}"
    sentence = (
        _sentence(phase, title, array, f"{array}{part}{place}{of}", f"{value:g}", x, ct)
        + f" Not finite in {array.removeprefix('params ')}: {int(found.nonfinite)} of {found.size}."
    )
    born, said = None, ""
    if stop is not None and array not in ("x", "ct"):
        born, said = _born(array, part, example, stop, walk[-1])
    array, sentence = array + part, sentence + said
    return Finding(phase, layer, array, index, value, example, x, ct, born, sentence, suspects)


def _born(
    array: str, part: str, example: int | None, stop: Stop, target: PyTree
) -> tuple[Birth | None, str]:
    """Return the equation that made an array non-finite, and what to say if none was found."""
    kind = array
    if array.startswith(GRADIENT):
        kind, part = "grads", array.removeprefix(GRADIENT).removeprefix(" by ")
    try:
        found = birth(Sought(kind, part, example), stop, target)
    except Exception as error:  # some programs cannot be run so, such as one with a callback
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        return None, f" The equation that made it was not found: {said}"
    if found is None:
        return None, " Run equation by equation it is finite: the equation was not found."
    return found, ""


def _sentence(
    phase: Phase, title: str, array: str, place: str, value: str, x: PyTree, ct: Cotangent
) -> str:
    if phase == "input":
        whose, what = f" of {title}" if title else "", array.replace("params ", "the param ")
        at = f"{place}," if ", of example" in place else place.removeprefix("params ")
        return f"Before the walk began {what}{whose} was not finite: {at} is {value}."
    way = "On the way back" if phase == "backward" or array == "d_x" else "On the way forward"
    if array == "x" or (array == "ct" and phase == "backward"):
        return (
            f"{way} {place}, is {value} as it comes to {title}, while what the layers before it "
            "gave was finite: a sum (at a skip, say) or a cast overflowed."
        )
    which, brought = ("ct", ct) if way == "On the way back" and phase != "loss" else ("x", x)
    sizes = [np.max(np.abs(np.asarray(leaf, np.float64)), initial=0) for leaf in _leaves(brought)]
    size = f"; the largest |{which}| of that example was {short(max(sizes))}" if sizes else ""
    return f"{way} {title} gave {value}: {place}. All before it was finite{size}."


def _suspects(terms: Explanation) -> Iterator[str]:
    """Yield a sentence on each layer that is finite but in trouble."""
    first = terms.loss.summaries.d_x
    sizes: list[tuple[float, str]] = []
    for name, at in terms.runs():
        s, title = at.summaries, f"Layer {name} {at.layer}".replace("  ", " ")
        if s.dead is not None and s.y is not None and s.dead > DEAD:
            rows = math.prod(s.y.shape[:-1])
            if rows >= ROWS:
                yield f"{title}: {share(s.dead)} of its units are dead, flat for every example."
        if s.saturated is not None and s.saturated > SATURATED and not isinstance(at.layer, Relu):
            yield f"{title} is saturated: {share(s.saturated)} of its slopes are below 0.01."
        if s.ct is not None and not s.ct.nonfinite and first is not None and first.rms:
            sizes.append((float(s.ct.rms) / float(first.rms), title))
    if sizes and max(sizes)[0] > EXPLODING:
        ratio, title = max(sizes)
        yield f"{title}: cotangents explode, to {short(ratio)} times the loss's own."
    if sizes and min(sizes)[0] < VANISHING:
        ratio, title = min(sizes)
        yield f"{title}: cotangents vanish, to {short(ratio)} of the loss's own."


@functools.partial(jax.jit, static_argnums=(0, 1))
def _walked(
    net: Layer, loss: Loss, params: Params, x: PyTree, target: PyTree
) -> tuple[Explanation, Summary | None, Summary | None]:
    """Return an explanation in summaries, and the summaries of x and target."""
    return explain(net, loss, params, x, target, keep=0), summary(x), summary(target)


def _leaves(tree: PyTree) -> list[Array]:
    """Return the leaves that are not empty."""
    return [leaf for leaf in jax.tree.leaves(tree) if np.size(leaf)]

"""From a non-finite array of a walk to the equation where it was born."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.births.ahead import Born, look
from jaxprop.births.back import look_back
from jaxprop.births.birth import Birth, birth_of
from jaxprop.combinators.cast import Cast
from jaxprop.core.arrays import is_inexact, rounded
from jaxprop.core.batch import Batch
from jaxprop.core.combinator import Wrapper, map_layers, seen_through
from jaxprop.core.cotangents import gradient
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.step import Step
from jaxprop.core.tree import arrays, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.core.walk import forward
from jaxprop.explanation.order import in_order
from jaxprop.explanation.record import Recorded, RecordedLoss
from jaxprop.explanation.terms import by_name
from jaxprop.losses.function import FunctionLoss
from jaxprop.traced.equations import Program, struct
from jaxprop.traced.example import is_learned
from jaxprop.traced.function import Function


class Sought(NamedTuple):
    """A non-finite array of a walk.

    Attributes:
        array: "y", "d_x", or "grads".
        part: its place in the tree of y, d_x or grads: a path, or a param's name.
        example: its first example that is not finite; None for a gradient.
    """

    array: str
    part: str
    example: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stop:
    """All inputs of one layer, or of the loss, on the way forward and on the way back.

    Attributes:
        layer: the layer, or the loss.
        params: the layer's params.
        x: its input.
        residuals: what it saved; nothing for a function, which is differentiated again.
        ct: the cotangent of its output, for each example's own loss.
    """

    layer: Layer | Loss = dataclasses.field(metadata={"static": True})
    params: Params
    x: PyTree
    residuals: Residuals
    ct: Cotangent


def birth(sought: Sought, stop: Stop, target: PyTree) -> Birth | None:
    """Return where an array of a walk was born; None if that was not found.

    A layer's own forward and backward are traced for the batch and run equation by equation. The fn
    of a ``Function`` is traced for the one example and differentiated equation by equation.

    Args:
        sought: the array.
        stop: the inputs that the array is computed from.
        target: the target of the walk.
    """
    layer, examples = stop.layer, jax.tree.leaves(stop.ct)[0].shape[0]
    ahead = functools.partial(_ahead, examples, sought)
    if isinstance(layer, Loss):
        if sought.array == "y":
            return ahead(lambda *args: layer.forward(*args)[0], [stop.x, target])
        if isinstance(layer, FunctionLoss):
            return _of_function_loss(layer, stop.x, target, sought)
        return ahead(layer.backward, [stop.residuals])
    if isinstance(seen_through(layer), Function):
        return _of_function(_with_casts(layer), stop, sought)
    if sought.array == "y":
        return ahead(lambda *args: layer.forward(*args)[0], [stop.params, stop.x])
    backward = functools.partial(_backward, layer, sought.array)
    return ahead(backward, [stop.params, stop.residuals, stop.ct])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def stopped(
    at: str | None, net: Layer, loss: Loss, params: Params, x: PyTree, target: PyTree
) -> Stop:
    """Return the ``Stop`` of one layer in a walk, or of the loss for None; no other is computed."""
    ahead = forward(map_layers(net, Recorded), RecordedLoss(loss), params, Batch(x, target))
    y, values, residuals = ahead.residuals
    if at is None:
        return Stop(loss, (), y, residuals, jnp.ones_like(values))
    collected, _ = ahead.back(ahead.own_gradient(), _stop)
    return dict(in_order(net, by_name(collected, Stop)))[at]


def _stop(step: Step) -> Stop:
    assert isinstance(step.layer, Recorded)
    layer, (x, _, residuals) = step.layer.layer, step.residuals
    if isinstance(seen_through(layer), Function):
        residuals = ()  # those of all examples; fn is differentiated again for one example
    return Stop(layer, step.params, x, residuals, step.ct)


def _backward(
    layer: Layer, array: str, params: Params, residuals: Residuals, ct: Cotangent
) -> PyTree:
    d_params, d_x = layer.backward(params, residuals, ct)
    if array == "d_x":
        return d_x
    return gradient(Step.of(layer, params, residuals, ct, d_params, d_x, params))


def _ahead(
    examples: int, sought: Sought, f: Callable[..., PyTree], args: list[PyTree]
) -> Birth | None:
    """Find where a leaf of the result of a function of a batch was born."""
    leaves, structure = jax.tree.flatten(args)
    names: list[str] = []

    def flat(leaves: Sequence[Any]) -> list[Any]:
        outs = f(*jax.tree.unflatten(structure, leaves))
        names[:] = map(_name(sought), jax.tree.leaves_with_path(outs))
        return jax.tree.leaves(outs)

    program = Program.of(jax.make_jaxpr(flat)(leaves))
    found = look(program, leaves, [names.index(sought.part)])
    if found.first is None:
        return None
    return birth_of(found.first._replace(back=sought.array != "y"), examples, sought.example)


def _name(sought: Sought) -> Callable[[tuple[Any, Any]], str]:
    """Return a function that names a leaf with its path; params are named as in ``by_name``."""
    plainly = {"simple": True, "separator": "."} if sought.array == "grads" else {}
    return lambda leaf: jax.tree_util.keystr(leaf[0], **plainly)


def _of_function_loss(
    loss: FunctionLoss, y: PyTree, target: PyTree, sought: Sought
) -> Birth | None:
    """Find where the cotangent of one example's y was born, by differentiating the function."""
    y, target = _only(sought.example, (y, target))
    leaves, structure = jax.tree.flatten(y)

    def flat(leaves: Sequence[Any]) -> Array:
        return loss.forward(jax.tree.unflatten(structure, leaves), target)[0]

    program = Program.of(jax.make_jaxpr(flat)(leaves))
    names = list(map(_name(sought), jax.tree.leaves_with_path(y)))
    ct = jnp.ones_like(flat(leaves))
    flags = list(map(is_inexact, leaves))
    born = look_back(program, leaves, flags, [ct], [names.index(sought.part)])
    return None if born is None else birth_of(born, None, sought.example)


def _with_casts(layer: Layer) -> Callable[..., PyTree]:
    """Return the function in a layer, with the rounding that the wrappers around it do."""
    if isinstance(layer, Function):
        return layer.fn
    assert isinstance(layer, Wrapper)
    inner = _with_casts(layer.layer)
    if not isinstance(layer, Cast):
        return inner
    dtype = layer.dtype
    return lambda params, x: inner(rounded(params, dtype), rounded(x, dtype))


def _of_function(fn: Callable[..., PyTree], stop: Stop, sought: Sought) -> Birth | None:
    """Look inside a function, for one example, or for all if no single one is responsible."""
    of_params = [
        (jax.tree_util.keystr(path, simple=True, separator="."), is_learned(node))
        for path, node in jax.tree.leaves_with_path(stop.params, is_leaf=is_not_learned)
    ]
    params, structure = jax.tree.flatten(arrays(stop.params))
    params = list(map(jnp.asarray, params))
    of_x = jax.tree.structure(stop.x)

    def alone(params: Sequence[Any], x: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(
            fn(jax.tree.unflatten(structure, params), jax.tree.unflatten(of_x, x))
        )

    def of_batch(params: Sequence[Any], x: Sequence[Any]) -> list[Any]:
        outs = jax.vmap(lambda x: alone(params, [leaf[None] for leaf in x]))(x)
        return [out.reshape(out.shape[0], *out.shape[2:]) for out in outs]

    flags = [learned for _, learned in of_params] + list(map(is_inexact, jax.tree.leaves(stop.x)))
    if sought.array == "grads":
        wanted = [name for name, _ in of_params].index(sought.part)
    else:
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(stop.x)]
        wanted = len(params) + paths.index(sought.part) if sought.array == "d_x" else 0
    ways = [(alone, sought.example)] if sought.example is not None else []
    if sought.array == "grads":
        some = _first_example(of_batch, params, stop, wanted)
        ways = [(of_batch, None)] if some is None else [(alone, some)]
    for f, example in ways:
        x, ct = _only(example, (stop.x, stop.ct))
        xs, cts = jax.tree.leaves(x), jax.tree.leaves(ct)
        program = Program.of(jax.make_jaxpr(f)(params, xs))
        cts = [
            ct.reshape(struct(var).shape)
            for ct, var in zip(cts, program.jaxpr.outvars, strict=True)
        ]
        born = _in_program(program, [*params, *xs], flags, cts, wanted, sought)
        if born is not None:
            return birth_of(born, None, example)
    return None


def _in_program(
    program: Program,
    args: list[Any],
    flags: list[bool],
    cts: list[Any],
    wanted: int,
    sought: Sought,
) -> Born | None:
    if sought.array != "y":
        return look_back(program, args, flags, cts, [wanted])
    return look(program, args, range(len(program.jaxpr.outvars))).first


def _first_example(
    f: Callable[..., list[Any]], params: list[Any], stop: Stop, wanted: int
) -> int | None:
    """Return the first example whose own gradient for a param is not finite."""

    def finite(here: tuple[list[Any], list[Any]]) -> Array:
        xs, cts = (jax.tree.map(lambda leaf: leaf[None], leaves) for leaves in here)

        def of_one(param: Array) -> list[Any]:
            outs = f([*params[:wanted], param, *params[wanted + 1 :]], xs)
            return [out for out in outs if is_inexact(out)]

        (d,) = jax.vjp(of_one, params[wanted])[1]([ct for ct in cts if is_inexact(ct)])
        return jnp.isfinite(d).all()

    each = jax.lax.map(finite, (jax.tree.leaves(stop.x), jax.tree.leaves(stop.ct)))
    return None if bool(each.all()) else int(each.argmin())


def _only(example: int | None, trees: PyTree) -> PyTree:
    """Return the batch of one example; the whole batch for None."""
    if example is None:
        return trees
    return jax.tree.map(lambda leaf: leaf[example : example + 1], trees)

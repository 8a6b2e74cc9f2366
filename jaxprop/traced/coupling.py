"""Functions that couple the examples of a batch: detecting them, and the operation that does it.

``jax.vmap`` of the function of one example computes the function of a batch only if no example's y
depends on the others. A function that couples examples would silently become another function.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprop.core.types import Params, PyTree
from jaxprop.traced.equations import Program, Scan, evaluate, inlined, primitive_of, scan_of
from jaxprop.traced.origin import origin_of

LARGEST = 3 * 10**7  # a function with more numbers in its params is not tried
TIMES = 3  # how often it is tried
RTOL = {"f16[": 5e-2, "f32[": 1e-3, "": 1e-8}  # how far two programs with such floats may differ
EXAMPLES = 5  # in the search for the operation: an axis of this size is taken as the examples'
QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}
_VERDICTS: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def check_uncoupled_function(
    fn: Callable[..., PyTree], name: str, params: Params, x: PyTree
) -> None:
    """Raise ``ValueError`` if a function's y of an example depends on the rest of the batch.

    The function is tried once per set of shapes, on two examples of random numbers: both together
    and each alone. This helps but proves nothing. A function is not tried if it has more than 30
    million params or closes over a tracer, and is taken for one that does not couple examples if it
    returns no finite numbers for random ones. Printing by
    ``jax.debug.print``, or another callback without a result, is left out of a try; a function
    that prints within a ``cond`` or a while loop is not tried.

    Args:
        fn: the function.
        name: its name in the message.
        params: its params, as plain arrays.
        x: a batch.
    """
    leaves, structure = jax.tree.flatten((params, x))
    if any(not isinstance(size, int) for leaf in leaves for size in jnp.shape(leaf)):
        return  # a symbol, in jax.export
    structs = tuple(jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in leaves)
    number = len(jax.tree.leaves(params))
    of_one = tuple(
        jax.ShapeDtypeStruct((1, *struct.shape[1:]), struct.dtype) for struct in structs[number:]
    )
    known, shaped = _verdicts(fn), (structure, structs[:number], of_one)
    tried = (getattr(fn, "__func__", None), *shaped)
    if tried not in known:
        known[tried] = _coupling(fn, *shaped)
    said = known[tried]
    if said is not None:
        raise ValueError(
            f"{name} gives an example a different y in a batch than alone{said}. If it couples the "
            "examples of a batch, an example has no gradient of its own and no per-example "
            "quantity; jax.grad has the gradient of the batch. If it draws with one key for the "
            "whole batch, give x a key for each example"
        )


def _verdicts(fn: Callable[..., PyTree]) -> dict[Any, str | None]:
    """Return the verdicts on a function, or on a method's object, kept as long as that lives."""
    try:
        return _VERDICTS.setdefault(getattr(fn, "__self__", fn), {})
    except TypeError:  # no weak reference can be made to it
        return {}


def _coupling(
    fn: Callable[..., PyTree],
    structure: Any,
    params: tuple[jax.ShapeDtypeStruct, ...],
    x: tuple[jax.ShapeDtypeStruct, ...],
) -> str | None:
    """Return the words for the operation that couples examples: "" if unknown, None without one."""
    if sum(leaf.size for leaf in params) > LARGEST:
        return None

    def flat(params: Sequence[Any], x: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(fn(*jax.tree.unflatten(structure, [*params, *x])))

    def both(params: Sequence[Any], x: Sequence[Any]) -> Any:
        alone = jax.vmap(lambda x: flat(params, [leaf[None] for leaf in x]))(x)
        return flat(params, x), alone

    try:
        draw = functools.partial(_drawn, np.random.default_rng(0))
        weights = [draw(leaf) for leaf in params]
        batches = [[draw(leaf, 2) for leaf in x] for _ in range(TIMES)]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            traced = jax.make_jaxpr(both, return_shape=True)(weights, batches[0])
            silent = jax.jit(_silent(*traced)).trace(weights, batches[0])
            if silent.jaxpr.effects:
                return None
            program = silent.lower().compile(compiler_options=QUICKLY)
            batches += _of_its_integers(draw, x, str(silent.jaxpr))
            with jax.ensure_compile_time_eval():  # callbacks to Python get numbers, not tracers
                tries = [program(weights, batch) for batch in batches]
    except Exception:  # an error of the function itself is raised where it is used
        return None
    text = str(silent.jaxpr)
    rtol = next(rtol for floats, rtol in RTOL.items() if floats in text)
    pairs = [pair for of_try in tries for pair in zip(*of_try, strict=True)]
    if all(_same(together, alone, rtol) for together, alone in pairs):
        return None
    try:
        return _where(flat, weights, [draw(leaf, EXAMPLES) for leaf in x])
    except Exception:
        return ""


def _silent(jaxpr: Any, y: PyTree) -> Callable[..., PyTree]:
    """Return a traced function without equations that only have an effect, such as printing.

    Args:
        jaxpr: the function, traced.
        y: its results, or their shapes.
    """

    def step(equation: Any, ins: list[Any]) -> list[Any]:
        if not equation.outvars:
            return []
        inner = inlined(equation)
        if inner is not None:
            return inner.run(ins, step)
        if primitive_of(equation) == "scan":
            return _scanned(scan_of(equation), ins, step)
        return evaluate(equation, ins)

    def function(*args: PyTree) -> PyTree:
        outs = Program.of(jaxpr).run(jax.tree.leaves(args), step)
        return jax.tree.unflatten(jax.tree.structure(y), outs)

    return function


def _scanned(scan: Scan, ins: list[Any], step: Callable[..., list[Any]]) -> list[Any]:
    """Return the outputs of a scan, with each equation of its body run by ``step``."""
    at, behind = scan.carried.start, scan.carried.stop

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = scan.body.run([*ins[:at], *carry, *xs], step)
        return outs[: scan.carry], outs[scan.carry :]

    carry, ys = jax.lax.scan(body, ins[at:behind], ins[behind:], **scan.options)
    return [*carry, *ys]


def _same(together: Any, alone: Any, rtol: float) -> bool:
    """Return whether the y of two examples together is the y of each alone, or the mean of both."""
    if np.ndim(together) and np.shape(together)[:1] != (2,):
        return False
    wide = np.complex128 if np.iscomplexobj(together) else np.float64
    a, b = np.asarray(together, wide), np.asarray(alone, wide)
    b = b.reshape(a.shape) if a.ndim else b.mean()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return not np.isfinite(a).all()  # if finite together, it should be finite alone
    return bool(np.max(np.abs(a - b), initial=0) <= rtol * (np.max(np.abs(b), initial=0) + 1e-30))


def _of_its_integers(
    draw: Callable[..., Any], x: Sequence[jax.ShapeDtypeStruct], program: str
) -> list[list[Any]]:
    """Return batches for each leaf of integers, filled with the integers that the program mentions.

    A label of -100, say, may mean that a position is not counted; random numbers do not contain it.

    Args:
        draw: returns random numbers for a leaf.
        x: the leaves of one example.
        program: the traced program, printed.
    """
    spoken = np.array([0, 1, *sorted(set(map(int, re.findall(r"(-?\d+):[iu]\d+\[\]", program))))])
    rng, batches = np.random.default_rng(2), list[list[Any]]()
    for index, leaf in enumerate(x):
        if not jnp.issubdtype(leaf.dtype, jnp.integer):
            continue
        info = jnp.iinfo(leaf.dtype)
        some = spoken[(spoken >= info.min) & (spoken <= info.max)].astype(leaf.dtype)
        for _ in range(TIMES):
            batch = [draw(leaf, 2) for leaf in x]
            batch[index] = some[rng.integers(0, len(some), batch[index].shape)]
            batches.append(batch)
    return batches


def _drawn(
    rng: np.random.Generator, leaf: jax.ShapeDtypeStruct, examples: int | None = None
) -> Any:
    """Return random numbers for a leaf of x, with ``examples``, or of params, at a useful scale."""
    shape = leaf.shape if examples is None else (examples, *leaf.shape[1:])
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(0), int(np.prod(shape)))
        return keys.reshape(shape)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        size = 1.0 if examples is not None or len(shape) < 2 else np.sqrt(3 / max(shape[-2], 1))
        return (rng.uniform(-1, 1, shape) * size).astype(leaf.dtype)
    return rng.integers(0, 2, shape).astype(leaf.dtype)


def _where(flat: Callable[..., list[Any]], params: Sequence[Any], x: Sequence[Any]) -> str | None:
    """Return where one example first reaches another, from what changes if the first is changed."""
    program = Program.of(jax.make_jaxpr(flat)(params, x))
    draw = functools.partial(_drawn, np.random.default_rng(1))
    found: list[str] = []

    def other(leaf: Any) -> Any:
        new = draw(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), leaf.shape[0])
        if not isinstance(leaf, np.ndarray):
            return leaf.at[0].set(jax.random.key(1))
        new[1:] = leaf[1:]
        return 1 - new if new.dtype.kind in "iu" and np.array_equal(new, leaf) else new

    def step(equation: Any, ins: list[Any]) -> list[Any]:
        if not equation.outvars:
            return []
        pairs = [pair if isinstance(pair, _Pair) else _Pair(pair, pair) for pair in ins]
        inner = inlined(equation)
        if inner is not None:
            return inner.run(pairs, step)
        outs = zip(
            evaluate(equation, [pair.before for pair in pairs]),
            evaluate(equation, [pair.after for pair in pairs]),
            strict=True,
        )
        result = [_Pair(*out) for out in outs]
        if not found and all(p.apart() for p in pairs) and not all(p.apart() for p in result):
            line, scope = origin_of(equation)
            at = (f" at {line}" if line else "") + (f" in {scope}" if scope else "")
            found.append(f": {primitive_of(equation)}{at} lets one reach another")
        return result

    with jax.ensure_compile_time_eval():
        program.run([*params, *(_Pair(leaf, other(leaf)) for leaf in x)], step)
    return found[0] if found else ""


class _Pair:
    """A value before and after the first example was replaced."""

    def __init__(self, before: Any, after: Any) -> None:
        self.before, self.after = before, after

    def apart(self) -> bool:
        """Return whether at most the first entry along an axis of examples differs, or a scalar."""
        if self.before is self.after or not np.ndim(self.before):
            return True
        if jnp.issubdtype(self.before.dtype, jax.dtypes.extended):
            return True
        moved = np.asarray(self.before) != np.asarray(self.after)
        if not moved.any():
            return True
        axes = [axis for axis, size in enumerate(moved.shape) if size == EXAMPLES]
        return any(not np.delete(moved, 0, axis).any() for axis in axes)

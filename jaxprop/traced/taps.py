"""Taps: a traced program run so that each place where a param meets data can be told its cotangent.

Where a param, or a view of one, meets data in a matrix product, a convolution or a look-up of rows,
a zero is added to the result, and the data are remembered. The cotangent of the zero is that of the
result, and with the data it makes a form. Wherever else a param is used, the program sees param + 0
with a zero for each example, whose cotangent is that example's own share of the gradient.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jaxprop.core.forms import Move, Reshaped, Scanned, Sliced, Transposed, Turned
from jaxprop.core.mesh import shard_map_axes, zero_beside
from jaxprop.traced.ends import ends_of
from jaxprop.traced.equal import Equal
from jaxprop.traced.equations import (
    Axes,
    Convolution,
    Dot,
    Place,
    Program,
    branches_of,
    clips_ids,
    convolution_of,
    dot_of,
    evaluate,
    for_tracing,
    inlined,
    joined_axis_of,
    kept_axes_of,
    looks_up_rows,
    order_of,
    permutation_of,
    pieces_of,
    place_of,
    rematerialized,
    reversed_axes_of,
    scan_of,
    slice_of,
    struct,
)
from jaxprop.traced.views import Part, View, bare, is_data, placed, plain


class Product(NamedTuple):
    """A matrix product of data with a view.

    Attributes:
        dot: the axes that are contracted and batched, those of the data first.
        data_first: whether the data are the left operand.
    """

    dot: Dot
    data_first: bool


class LookUp(NamedTuple):
    """A look-up of rows, with ids outside of the table clipped or in no row."""

    clipped: bool


class Watched(NamedTuple):
    """No meeting, but the end of a named scope: the data are its result.

    Attributes:
        params: the number of each param that was used in the scope, with what stands in the view's
            ``scans``.
    """

    params: tuple[tuple[int, tuple[bool, ...]], ...]


Meeting: TypeAlias = Product | Convolution | LookUp | Watched


@dataclasses.dataclass(frozen=True)
class Use:
    """A place where a view meets data, or where the result of a scope is watched.

    Attributes:
        meeting: how they meet.
        parts: the params in the view.
        joined: the axis that several params are joined on.
        shape: that of the view there.
        scans: as in the view.
        primitive: the name of the primitive.
        line: the source line.
        scope: the named scope.
        again: whether the data are computed again on the way back, and come with the cotangent.
        before: how many places before it is the one that it shares a zero with: 0 for its own.
    """

    meeting: Meeting
    parts: tuple[Part, ...]
    joined: int | None
    shape: Axes
    scans: tuple[bool, ...]
    primitive: str
    line: str
    scope: str
    again: bool = False
    before: int = 0


class Taps:
    """What is tapped while a program runs.

    Attributes:
        uses: the places, in the order in which they are met.
        xs: the data at each; None where they come with the cotangent.
        zeros: the shape of the zero that is added at each, in a pair with that of its data where
            these come with the cotangent; None where another's will do.
        equal: which variables of the program that runs have the same cotangent.
        watching: whether the results of named scopes are tapped too.
        met: the params that were used since the last such result, as in ``Watched``.
    """

    def __init__(
        self,
        zeros: Sequence[Any] | None = None,
        within: Sequence[Place] = (),
        watching: bool = False,
        scans: tuple[bool, ...] = (),
        again: bool = False,
    ) -> None:
        """Tap nothing yet.

        Args:
            zeros: what is added at each place; None if that is yet to be found out.
            within: the places of the equations whose programs these are, the outermost first.
            watching: whether the results of named scopes are tapped too.
            scans: for each scan that these are in, whether it goes through layers.
            again: whether what runs is computed again on the way back.
        """
        self.uses: list[Use] = []
        self.xs: list[Any] = []
        self.zeros: list[Any] = []
        self.within = tuple(within)
        self.watching, self.met = watching, dict[tuple[int, tuple[bool, ...]], None]()
        self.equal: Equal | None = None
        self._given, self._scans, self._again = zeros, scans, again

    def inside(self, zeros: Sequence[Any] | None = None, *scans: bool, again: bool = False) -> Taps:
        """Return taps for a program within this one.

        Args:
            zeros: what is added at each place; None if that is yet to be found out.
            scans: for each scan around it in this one, whether it goes through layers.
            again: whether it is computed again on the way back.
        """
        scans, again = (*self._scans, *scans), again or self._again
        return Taps(zeros, self.within, self.watching, scans, again)

    @property
    def line(self) -> str:
        """The innermost source line that is known of."""
        return next((place.line for place in reversed(self.within) if place.line), "")

    @property
    def scope(self) -> str:
        """The named scopes, one within the other."""
        return "/".join(place.scope for place in self.within if place.scope)

    def next(self, number: int) -> Sequence[Any] | None:
        """Return what is added at the next so many places."""
        at = len(self.uses)
        return None if self._given is None else self._given[at : at + number]

    def add(self, use: Use, x: Array, y: Array, var: Any = None) -> Array:
        """Return y with the zero of this place.

        Args:
            use: the place.
            x: the data.
            y: the result.
            var: its variable, if another may have the same cotangent.
        """
        if var is not None and self.equal is not None and not self._again:
            first = self.equal.first(var, len(self.uses))
            if first < len(self.uses):
                use = dataclasses.replace(use, before=len(self.uses) - first)
                self.note([use], [x], [None])
                return y
        given, zero = self.next(1), struct(y)
        if self._again and is_inexact(x):
            self.note([dataclasses.replace(use, again=True)], [None], [(zero, struct(x))])
            return y if given is None else told(y, x, *given[0])
        self.note([use], [x], [zero])
        return y if given is None else y + given[0]

    def keep_shapes(self) -> None:
        """Keep of the data their shapes alone: they are of a trace that is over."""
        self.xs = jax.tree.map(struct, self.xs)

    def watched(self) -> int:
        """Return how many results of scopes were tapped."""
        return sum(isinstance(use.meeting, Watched) for use in self.uses)

    def watch(self, equation: JaxprEqn, y: Array) -> Array:
        """Return the result of a scope with the zero of this place."""
        meeting, name = Watched(tuple(self.met)), equation.primitive.name
        self.met.clear()
        use = Use(meeting, (), None, (), self._scans, name, self.line, self.scope)
        return self.add(use, y, y)

    def note(self, uses: Sequence[Use], xs: Sequence[Any], zeros: Sequence[Any]) -> None:
        """Note places whose zeros are added already."""
        self.uses += uses
        self.xs += xs
        self.zeros += zeros


@jax.custom_vjp
def told(y: Array, x: Array, zero: Array, place: Array) -> Array:
    """Return y; on the way back its cotangent is that of the zero, and x that of its place.

    In what is computed again on the way back x is not kept until then, and neither are the zeros.
    """
    del x, zero, place
    return y


def _told_forward(y: Array, x: Array, zero: Array, place: Array) -> tuple[Array, Array]:
    del zero, place
    return y, x


def _told_backward(x: Array, ct: Array) -> tuple[Array, None, Array, Array]:
    return ct, None, ct, x


told.defvjp(_told_forward, _told_backward)


def run(program: Program, args: Sequence[Any], taps: Taps) -> list[Any]:
    """Return the program's outputs, for inputs among which are views, tapped on the way."""
    outer, numbers, equal = taps.within, itertools.count(), taps.equal
    taps.equal = Equal(program)
    ends = ends_of(program, list(map(is_data, args))) if taps.watching else {}

    def step(equation: JaxprEqn, ins: list[Any]) -> list[Any]:
        end = ends.get(next(numbers))
        if end is None and not any(isinstance(value, View) for value in ins):
            return evaluate(equation, ins)
        taps.within = (*outer, place_of(equation))
        outs = _watched(taps, equation, ins, end) if taps.watching else _step(taps, equation, ins)
        taps.within = outer
        return outs

    outs = program.run(args, step)
    taps.equal = equal
    return outs


def _watched(taps: Taps, equation: JaxprEqn, ins: list[Any], end: int | None) -> list[Any]:
    """Return the outputs of an equation, with one of them watched if a scope ends with it."""
    before = taps.watched()
    tapped = any(isinstance(value, View) for value in ins)
    outs = _step(taps, equation, ins) if tapped else evaluate(equation, ins)
    if taps.watched() > before:  # scopes within it
        return outs
    if not all(isinstance(out, View) for out in outs):
        views = [value for value in ins if isinstance(value, View)]
        taps.met |= {(part.param, view.scans): None for view in views for part in view.parts}
    if end is not None and not isinstance(outs[end], View):
        outs[end] = taps.watch(equation, outs[end])
    return outs


def _step(taps: Taps, equation: JaxprEqn, ins: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if name in STEPS:
        result = STEPS[name](equation, ins, taps)
        if result is not None:
            return result
    elif (program := inlined(equation)) is not None:
        return run(program, ins, taps)
    elif (again := rematerialized(equation)) is not None:
        return _rematerialized(*again, ins, taps)
    if not any(is_inexact(struct(var)) for var in equation.outvars):
        return evaluate(equation, list(map(bare, ins)))  # nothing goes back through it
    return evaluate(equation, list(map(plain, ins)))


def _meet(
    meeting: Meeting, view: View, x: Any, equation: JaxprEqn, ins: list[Any], taps: Taps
) -> list[Any]:
    (y,) = evaluate(equation, list(map(bare, ins)))
    use = Use(
        meeting,
        view.parts,
        view.joined,
        view.value.shape,
        view.scans,
        equation.primitive.name,
        taps.line,
        taps.scope,
    )
    if isinstance(meeting, Product) and not _is_floating(x):  # as a product of several dtypes takes
        x = x.astype(y.dtype)
    data = x if view.scale is None else x * jnp.asarray(view.scale, x.dtype)
    return [taps.add(use, data, y, equation.outvars[0])]


def _product(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    left, right = ins
    if isinstance(left, View) and isinstance(right, View):
        return None
    data_first = isinstance(right, View)
    dot = dot_of(equation)
    if not data_first:
        dot = Dot(*((right, left) for left, right in dot))
    view, x = (right, left) if data_first else (left, right)
    return _meet(Product(dot, data_first), view, x, equation, ins, taps)


def _convolution(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    x, view = ins
    convolution = convolution_of(equation)
    if isinstance(x, View) or view.joined is not None or convolution is None:
        return None
    frames = x.shape[convolution.x[0]] > 1 or not all(view.scans)
    if len(convolution.strides) + frames > 3:
        return None
    return _meet(convolution, view, x, equation, ins, taps)


def _look_up(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    view, ids = ins
    if isinstance(ids, View) or view.joined is not None or view.scale is not None:
        return None
    if not looks_up_rows(equation):
        return None
    return _meet(LookUp(clips_ids(equation)), view, ids, equation, ins, taps)


def _moving(
    move_of: Callable[[JaxprEqn, View], Move | None],
) -> Callable[[JaxprEqn, list[Any], Taps], list[Any] | None]:
    """Return the step of an equation that moves the entries of its one input."""

    def step(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
        view, *rest = ins
        if rest or not isinstance(view, View):
            return None
        move = move_of(equation, view)
        if move is not None and view.joined is not None:
            return None
        return [view.moved(move, lambda value: evaluate(equation, [value])[0])]

    return step


def _reshape(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    """A reshape, which may take the axes in another order first, as one of columns does."""
    order = order_of(equation)
    if order is None:
        return RESHAPE(equation, ins, taps)
    view, *rest = ins
    if rest or view.joined is not None:
        return None
    shape = struct(equation.outvars[0]).shape
    view = view.moved(Transposed(order), lambda value: jnp.transpose(value, order))
    return [view.moved(Reshaped(view.value.shape), lambda value: value.reshape(shape))]


def _split(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    (view,), (sizes, axis) = ins, pieces_of(equation)
    if view.joined is not None:
        return None

    def piece(start: int, size: int) -> View:
        starts, strides = [0] * view.value.ndim, (1,) * view.value.ndim
        starts[axis] = start
        move = Sliced(view.value.shape, tuple(starts), strides)
        return view.moved(
            move, lambda value: jax.lax.slice_in_dim(value, start, start + size, axis=axis)
        )

    starts = itertools.accumulate(sizes, initial=0)
    return [piece(*each) for each in zip(starts, sizes, strict=False)]


def _broadcast(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    """A broadcast that only adds axes of length 1, and leaves the others in order."""
    out, kept = struct(equation.outvars[0]), kept_axes_of(equation)
    if len(ins) > 1 or out.size != ins[0].value.size or list(kept) != sorted(kept):
        return None
    return RESHAPE(equation, ins, taps)


def _cast(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    return STAY(equation, ins, taps) if _is_floating(struct(equation.outvars[0])) else None


def _scaling(factor: Callable[[Any], Any]) -> Callable[..., list[Any] | None]:
    """Return the step of a product of a view with a number, in one of the two orders."""

    def step(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
        at = int(isinstance(ins[-1], View))
        view, others = ins[at], [other for index, other in enumerate(ins) if index != at]
        if any(isinstance(other, View) or jnp.shape(other) for other in others):
            return None
        if equation.primitive.name == "div" and at:
            return None

        def f(value: Array) -> Array:
            return evaluate(equation, [value, *others] if not at else [*others, value])[0]

        return [view.scaled(factor(*others), f)]

    return step


def _negated(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any]:
    return [ins[0].scaled(-1, lambda value: evaluate(equation, [value])[0])]


def _joined(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    return _side_by_side(equation, ins, ins)


def _stacked(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    axis = joined_axis_of(equation)

    def entry(value: Any) -> Any:
        if not isinstance(value, View):
            return jnp.expand_dims(value, axis)
        return value.moved(Reshaped(value.value.shape), lambda v: jnp.expand_dims(v, axis))

    return _side_by_side(equation, ins, list(map(entry, ins)))


def _side_by_side(equation: JaxprEqn, ins: list[Any], entries: list[Any]) -> list[Any] | None:
    """Several params side by side: each has its part of the product's operands."""
    axis, start = joined_axis_of(equation), 0
    parts: list[Part] = []
    views = [value for value in entries if isinstance(value, View)]
    if any(len(v.parts) > 1 or v.scale is not None or v.scans != views[0].scans for v in views):
        return None
    for value in entries:
        length = bare(value).shape[axis]
        if isinstance(value, View):
            parts.append(value.parts[0]._replace(start=start, stop=start + length))
        start += length
    (joined,) = evaluate(equation, list(map(bare, ins)))

    def own() -> Array:
        return evaluate(equation, list(map(plain, ins)))[0]

    return [View(tuple(parts), joined, own, axis, scans=views[0].scans)]


def _scan(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any]:
    scan = scan_of(equation)
    carried = list(map(plain, ins[scan.consts : scan.consts + scan.carry]))
    stacks = ins[scan.consts + scan.carry :]
    consts = ins[: scan.consts]
    constants = list(map(bare, consts))
    asked: set[int] = set()

    def body(taps: Taps, carried: list[Any], values: list[Any], owns: list[Any]) -> list[Any]:
        """One step; ``owns`` are the values with the example's own share where it is asked for."""
        args: list[Any] = []
        for index, (given, value, own) in enumerate(
            zip([*consts, *stacks], values, owns, strict=True)
        ):
            if isinstance(given, View):
                value = _in_scan(given, index >= scan.consts, value, own, index, asked)
            args.append(value)
        return list(
            map(plain, run(scan.body, args[: scan.consts] + carried + args[scan.consts :], taps))
        )

    def first_run(carried: list[Any], stacks: list[Any]) -> list[Any]:
        values = constants + stacks
        outs = body(found, carried, values, values)
        found.keep_shapes()
        return outs

    layers = any(isinstance(value, View) for value in stacks)
    found = taps.inside(None, layers)
    slices = [_first(bare(stack)) for stack in stacks]
    jax.eval_shape(first_run, list(map(for_tracing, carried)), slices)

    owns = [
        plain(value) if index in asked else bare(value)
        for index, value in enumerate([*consts, *stacks])
    ]

    def step(carried: list[Any], here: Any) -> tuple[list[Any], Any]:
        zeros, values, stack_owns = here
        inner = taps.inside(zeros, layers)
        outs = body(inner, carried, constants + values, owns[: scan.consts] + stack_owns)
        return outs[: scan.carry], (outs[scan.carry :], inner.xs)

    here = taps.next(len(found.uses)), list(map(bare, stacks)), owns[scan.consts :]
    carried, (outs, xs) = jax.lax.scan(step, carried, here, **scan.options)
    zeros = jax.tree.map(
        lambda zero: jax.ShapeDtypeStruct((scan.length, *zero.shape), zero.dtype), found.zeros
    )
    taps.note(found.uses, xs, zeros)
    return [*carried, *outs]


def _first(stack: Any) -> Any:
    """Return an entry of a stack, for tracing."""
    if shard_map_axes() and stack.shape[0]:
        return jax.lax.index_in_dim(stack, 0, keepdims=False)
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)


def _in_scan(
    view: View, layers: bool, value: Array, own: Array, index: int, asked: set[int]
) -> View:
    """Return a view as a scan's body sees it."""
    parts, joined = view.parts, view.joined
    if layers:
        parts = tuple(part._replace(moves=(*part.moves, Scanned())) for part in parts)
    if layers and joined == 0:
        joined, axis = None, sum(view.scans)
        parts = tuple(part._replace(layers=axis) for part in parts)
    elif layers and joined is not None:
        joined -= 1

    def ask() -> Array:
        asked.add(index)
        return own

    return View(parts, value, ask, joined, view.scale, (*view.scans, layers))


def _switch(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    """A choice of branches: all are tapped, with zeros for the data of those not taken."""
    index, *args = ins
    if isinstance(index, View):
        return None
    branches = branches_of(equation)
    found = [taps.inside() for _ in branches]
    data = list(filter(is_data, args))
    for branch, inner in zip(branches, found, strict=True):
        _look_ahead(branch, args, inner)
    zeros = taps.next(sum(len(inner.uses) for inner in found))

    def chosen(number: int) -> Callable[[list[Any]], Any]:
        start = sum(len(inner.uses) for inner in found[:number])

        def f(data: list[Any]) -> Any:
            here = None if zeros is None else zeros[start : start + len(found[number].uses)]
            inner = taps.inside(here)
            outs = _run_with(branches[number], args, data, inner)
            xs = [
                inner.xs if n == number else jax.tree.map(jnp.zeros_like, other.xs)
                for n, other in enumerate(found)
            ]
            xs = jax.tree.map(lambda x: x + zero_beside(data, x.dtype), xs)
            return outs, [x for each in xs for x in each]

        return f

    index = jnp.asarray(index, jnp.int32)
    outs, xs = jax.lax.switch(index, [chosen(n) for n in range(len(branches))], data)
    for inner in found:
        taps.note(inner.uses, xs[: len(inner.uses)], inner.zeros)
        xs = xs[len(inner.uses) :]
    return outs


def _rematerialized(
    program: Program, options: dict[str, Any], ins: list[Any], taps: Taps
) -> list[Any]:
    """A part that is computed again on the way back."""
    found, data = taps.inside(again=True), list(filter(is_data, ins))
    _look_ahead(program, ins, found)

    def f(zeros: Sequence[Any] | None, data: list[Any]) -> Any:
        inner = taps.inside(zeros, again=True)
        return _run_with(program, ins, data, inner), inner.xs

    outs, xs = jax.checkpoint(f, **options)(taps.next(len(found.uses)), data)
    taps.note(found.uses, xs, found.zeros)
    return outs


def _run_with(program: Program, args: list[Any], data: list[Any], taps: Taps) -> list[Any]:
    """Return what a program gives for these data, beside the views among its inputs."""
    return list(map(plain, run(program, placed(data, list(map(is_data, args)), args), taps)))


def _look_ahead(program: Program, args: list[Any], taps: Taps) -> None:
    """Find out what there is to tap in a program, from the shapes of its data."""

    def first_run(data: list[Any]) -> list[Any]:
        outs = _run_with(program, args, data, taps)
        taps.keep_shapes()
        return outs

    jax.eval_shape(first_run, list(map(for_tracing, filter(is_data, args))))


def _is_floating(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def is_inexact(value: Any) -> bool:
    """Return whether an array has a cotangent: is floating or complex."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


RESHAPE = _moving(lambda equation, view: Reshaped(view.value.shape))
STAY = _moving(lambda equation, view: None)
TIMES = _scaling(lambda factor: factor)
STEPS: dict[str, Callable[[JaxprEqn, list[Any], Taps], list[Any] | None]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _look_up,
    "scan": _scan,
    "cond": _switch,
    "concatenate": _joined,
    "stack": _stacked,
    "reshape": _reshape,
    "squeeze": RESHAPE,
    "expand_dims": RESHAPE,
    "broadcast_in_dim": _broadcast,
    "transpose": _moving(lambda equation, view: Transposed(permutation_of(equation))),
    "slice": _moving(lambda equation, view: Sliced(view.value.shape, *slice_of(equation)[::2])),
    "split": _split,
    "rev": _moving(lambda equation, view: Turned(reversed_axes_of(equation))),
    "convert_element_type": _cast,
    "copy": STAY,
    "copy_p": STAY,
    "sharding_constraint": STAY,
    "stop_gradient": lambda equation, ins, taps: evaluate(equation, [ins[0].value]),
    "mul": TIMES,
    "div": _scaling(lambda factor: 1 / factor),
    "neg": _negated,
}

"""The equations of a traced program: running them again, and reading their parameters.

Every read of an equation's ``params`` is here, since they differ between versions of JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxprop.core.mesh import shard_map_axes

INLINED = frozenset(("jit", "closed_call"))
REMATERIALIZED = frozenset(("checkpoint", "remat2"))
RULED = frozenset(("custom_jvp_call", "custom_vjp_call"))
COMING = {  # jax_remat3, jax_custom_jvp3 and jax_custom_vjp3 make these objects of one primitive
    "RematTraced": "checkpoint",
    "CustomJVPTraced": "custom_jvp_call",
    "CustomVJPTraced": "custom_vjp_call",
}
LINEAR = frozenset(
    ("slice", "split", "reshape", "squeeze", "transpose", "rev", "neg", "convert_element_type")
)
Axes = tuple[int, ...]


class Lines(NamedTuple):
    """Some equations of a program, with the fields of a ``Jaxpr`` that are read."""

    constvars: Sequence[Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]
    eqns: Sequence[JaxprEqn]


class Program(NamedTuple):
    """A traced function, or a part of one: its equations and the constants that they close over."""

    jaxpr: Jaxpr | Lines
    consts: Sequence[Any]

    @classmethod
    def of(cls, jaxpr: Any) -> Program:
        """Return the program of a ``ClosedJaxpr``, or of a ``Jaxpr`` without constants."""
        if isinstance(jaxpr, ClosedJaxpr):
            return cls(jaxpr.jaxpr, jaxpr.consts)
        return cls(jaxpr, ())

    def run(
        self, args: Sequence[Any], step: Callable[[JaxprEqn, list[Any]], list[Any]]
    ) -> list[Any]:
        """Return the outputs, with ``step(equation, inputs)`` for the outputs of each equation."""
        values: dict[Any, Any] = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        values |= zip(self.jaxpr.invars, args, strict=True)

        def read(var: Any) -> Any:
            if isinstance(var, Literal):  # a Python number, in some versions of JAX
                return np.asarray(var.val, struct(var).dtype)
            return values[var]

        for equation in self.jaxpr.eqns:
            outs = step(equation, [read(var) for var in equation.invars])
            values |= zip(equation.outvars, outs, strict=True)
        return [read(var) for var in self.jaxpr.outvars]

    def part(
        self, invars: Sequence[Any], outvars: Sequence[Any], equations: Sequence[JaxprEqn]
    ) -> Program:
        """Return the program of some of the equations."""
        return Program(Lines(self.jaxpr.constvars, invars, outvars, equations), self.consts)

    def within(self) -> Program:
        """Return the inner program if this one does nothing but call it, else this one."""
        jaxpr = self.jaxpr
        if len(jaxpr.eqns) != 1:
            return self
        (equation,) = jaxpr.eqns
        inner = inlined(equation)
        same = equation.invars == jaxpr.invars and equation.outvars == jaxpr.outvars
        return self if inner is None or not same else inner.within()


class Scan(NamedTuple):
    """A scan: its body, the numbers of its constants and carried values, and its options."""

    body: Program
    consts: int
    carry: int
    length: int
    options: dict[str, Any]

    @property
    def carried(self) -> range:
        """The places of the carried values among the inputs; the stacks come after them."""
        return range(self.consts, self.consts + self.carry)


class While(NamedTuple):
    """A while loop: its condition and its body, and how many constants each of them has.

    The inputs are the constants of the condition, those of the body, and the carried values.
    """

    condition: Program
    body: Program
    condition_consts: int
    body_consts: int


class Dot(NamedTuple):
    """The contracted and the batched axes of a dot_general's two operands."""

    contracted: tuple[Axes, Axes]
    batched: tuple[Axes, Axes]


class Convolution(NamedTuple):
    """A convolution, with layouts (batch, channel, *spatial) of x and y, (O, I, *spatial) of w."""

    x: Axes
    w: Axes
    y: Axes
    strides: Axes
    padding: tuple[tuple[int, int], ...]
    dilation: Axes
    spread: Axes
    groups: int


def evaluate(equation: JaxprEqn, values: Sequence[Any]) -> list[Array]:
    """Return the equation's outputs for these inputs, by running a program of it alone."""
    wanted: dict[Any, Any] = {
        var: value
        for var, value in zip(equation.invars, values, strict=True)
        if not isinstance(var, Literal)
    }
    alone = _empty().replace(
        invars=list(wanted),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*wanted.values())


def primitive_of(equation: JaxprEqn) -> str:
    """Return the name of the equation's primitive, the same name however JAX represents it."""
    within = type(equation.params.get("_prim")).__name__
    return COMING.get(within, equation.primitive.name)


def inlined(equation: JaxprEqn) -> Program | None:
    """Return the program of an equation that does nothing but call it; None for another one."""
    if equation.primitive.name not in INLINED:
        return None
    return Program.of(_first(equation, "jaxpr", "call_jaxpr"))


def ruled(equation: JaxprEqn) -> Program | None:
    """Return the program of a function with a custom derivative rule; None for another equation."""
    if primitive_of(equation) not in RULED:
        return None
    if "_prim" in equation.params:
        return Program.of(equation.params["_prim"].traced.jaxpr)
    return Program.of(equation.params["call_jaxpr"])


def rule_of(equation: JaxprEqn) -> str:
    """Return the name of a function with a custom derivative rule; "" if it is not known."""
    program = ruled(equation)
    info = getattr(getattr(program and program.jaxpr, "debug_info", None), "func_src_info", "")
    return str(info or "").split(" at ")[0]


def while_of(equation: JaxprEqn) -> While:
    """Return the parameters of a while loop's equation."""
    params = equation.params
    return While(
        Program.of(params["cond_jaxpr"]),
        Program.of(params["body_jaxpr"]),
        params["cond_nconsts"],
        params["body_nconsts"],
    )


def scan_of(equation: JaxprEqn) -> Scan:
    """Return the parameters of a scan's equation."""
    params = equation.params
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    consts, carry = _counts(params)
    return Scan(Program.of(params["jaxpr"]), consts, carry, params["length"], options)


@functools.cache
def _empty() -> Jaxpr:
    """Return an empty program to fill in: one from JAX, which knows where it was traced."""
    return jax.make_jaxpr(lambda: ())().jaxpr


def _counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from jax 0.11 on
    return len(consts), len(carry)


def branches_of(equation: JaxprEqn) -> tuple[Program, ...]:
    """Return the programs that a ``cond`` or a ``switch`` chooses from by its first input."""
    return tuple(map(Program.of, equation.params["branches"]))


def rematerialized(equation: JaxprEqn) -> tuple[Program, dict[str, Any]] | None:
    """Return the program that is computed again on the way back, and ``jax.checkpoint``'s options.

    None for another equation.
    """
    if primitive_of(equation) not in REMATERIALIZED:
        return None
    params = equation.params
    if "_prim" in params:
        params = {"prevent_cse": True, **params["_prim"].params}
    options = {name: params[name] for name in ("policy", "prevent_cse")}
    return Program.of(params["jaxpr"]), options


def dot_of(equation: JaxprEqn) -> Dot:
    """Return the parameters of a dot_general's equation."""
    contracted, batched = equation.params["dimension_numbers"]
    return Dot(*(tuple(map(tuple, axes)) for axes in (contracted, batched)))  # pyright: ignore[reportArgumentType]


def convolution_of(equation: JaxprEqn) -> Convolution | None:
    """Return the parameters of a convolution's equation; None for one with groups of examples."""
    params = equation.params
    if params["batch_group_count"] != 1:
        return None
    layouts = params["dimension_numbers"]
    padding = tuple((int(low), int(high)) for low, high in params["padding"])
    return Convolution(
        tuple(layouts.lhs_spec),
        tuple(layouts.rhs_spec),
        tuple(layouts.out_spec),
        tuple(params["window_strides"]),
        padding,
        tuple(params["rhs_dilation"]),
        tuple(params["lhs_dilation"]),
        params["feature_group_count"],
    )


def looks_up_rows(equation: JaxprEqn) -> bool:
    """Return whether a gather takes whole entries of its operand's axis 0, by one index each.

    ``jax.vmap`` of ``table[id]`` has an index for each other axis too; if in bounds, these are 0.
    """
    of, (table, ids) = equation.params["dimension_numbers"], map(struct, equation.invars)
    whole = (1, *table.shape[1:]) == tuple(equation.params["slice_sizes"])
    starts, collapsed = tuple(of.start_index_map), tuple(of.collapsed_slice_dims)
    rows = starts == (0,) or (starts[:1] == (0,) and _stays_inside(equation))
    kept = table.ndim - len(collapsed)
    last = tuple(range(ids.ndim - 1, ids.ndim - 1 + kept))
    batched = tuple(getattr(of, "operand_batching_dims", ()))
    return (
        whole and rows and not batched and collapsed in ((), (0,)) and tuple(of.offset_dims) == last
    )


def _stays_inside(equation: JaxprEqn) -> bool:
    """Return whether a gather stays in bounds, by a promise or by clipping."""
    return any(word in str(equation.params["mode"]).lower() for word in ("clip", "promise"))


def clips_ids(equation: JaxprEqn) -> bool:
    """Return whether a gather reads the nearest row for an id outside the table."""
    return "clip" in str(equation.params["mode"]).lower()


def linear(equation: JaxprEqn) -> str | None:
    """Return a key that is equal for equal operations, linear in one input; None for others."""
    if equation.primitive.name not in LINEAR:
        return None
    return f"{equation.primitive.name} {sorted(equation.params.items())} {equation.invars[0].aval}"


def permutation_of(equation: JaxprEqn) -> Axes:
    """Return the permutation of a transpose."""
    return tuple(equation.params["permutation"])


def order_of(equation: JaxprEqn) -> Axes | None:
    """Return the permutation that a reshape applies first, or None."""
    order = equation.params.get("dimensions")
    return None if order is None else tuple(order)


def slice_of(equation: JaxprEqn) -> tuple[Axes, Axes, Axes]:
    """Return the starts, limits and strides of a slice."""
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    return tuple(starts), tuple(limits), tuple(strides)


def pieces_of(equation: JaxprEqn) -> tuple[Axes, int]:
    """Return the sizes of the pieces of a split, and its axis."""
    return tuple(equation.params["sizes"]), equation.params["axis"]


def reversed_axes_of(equation: JaxprEqn) -> Axes:
    """Return the axes that a rev reverses."""
    return tuple(equation.params["dimensions"])


def kept_axes_of(equation: JaxprEqn) -> Axes:
    """Return where a broadcast_in_dim puts the axes of its operand."""
    return tuple(equation.params["broadcast_dimensions"])


def joined_axis_of(equation: JaxprEqn) -> int:
    """Return the axis of a concatenate, or the new axis of a stack."""
    return _first(equation, "dimension", "axis")


def name_of(equation: JaxprEqn) -> str:
    """Return the name of the primitive, or of the function that the equation calls."""
    name = primitive_of(equation)
    return str(equation.params.get("name") or name) if name in INLINED else name


def reduced_axes_of(equation: JaxprEqn) -> Axes:
    """Return the axes of a reduction; ``()`` for an equation that has none."""
    return tuple(equation.params.get("axes") or ())


def variables(atoms: Iterable[Any]) -> list[Any]:
    """Return the variables among some atoms, without the literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def struct(var: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a variable of a program, or of a value."""
    aval = getattr(var, "aval", var)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def for_tracing(value: Any) -> Any:
    """Return a stand-in for a value, to trace a program with.

    In ``jax.shard_map`` it is the value itself, whose type says along which axes devices differ.
    """
    return value if shard_map_axes() else struct(value)


def first_of(stack: Any) -> Any:
    """Return a stand-in for one entry of a stack, as ``for_tracing`` does for a value."""
    if shard_map_axes() and stack.shape[0]:
        return jax.lax.index_in_dim(stack, 0, keepdims=False)
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)


def _first(equation: JaxprEqn, *names: str) -> Any:
    """Return the parameter that has one of these names."""
    return next(equation.params[name] for name in names if name in equation.params)

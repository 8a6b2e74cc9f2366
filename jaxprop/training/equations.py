"""The equations of an optax update, grouped by the param that they belong to.

``optimizer.update`` takes all gradients and all state at once. Its trace is a list of equations,
most of which belong to a single param: they depend on that param's gradient and on no other. With
the equations and the optimizer's state grouped by param, each param can be updated alone; whatever
depends on no param (a step count, a schedule) is shared. This works for anything that optax
composes, masks and partitions included, and an update that looks across params is detected, not
guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxprop.core.types import Params, PyTree

SHARED, ACROSS = -1, -2  # owners: for what depends on no param, and on several
ENTRYWISE = frozenset(
    """abs add and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1
    floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg not or pow rem
    round rsqrt select_n sign sin sqrt square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)


class Equations:
    """The equations of the update (grads, state, params, seen) -> (params, state), by owner.

    Args:
        jaxpr: the traced update.
        params: the params, for their names in error messages.
        state: the optimizer's state, for its names likewise.

    Raises:
        ValueError: if the update of a param depends on another param's gradient or state.
    """

    def __init__(self, jaxpr: Jaxpr, params: Params, state: PyTree) -> None:
        self.names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
        self._states = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
        count, slots = len(self.names), len(self._states)
        self.grads_in, inputs = jaxpr.invars[:count], jaxpr.invars[count:]
        self.state_in, inputs = inputs[:slots], inputs[slots:]
        self.params_in, self.seen_in = inputs[:count], inputs[count:]
        self.params_out, self.state_out = jaxpr.outvars[:count], jaxpr.outvars[count:]
        needed = _needed(jaxpr)
        self.owner = self._owners(needed)
        self._hold_apart(needed)
        self._jaxpr = jaxpr
        self._equations: dict[int, list[JaxprEqn]] = {i: [] for i in (SHARED, *range(count))}
        for equation in needed:
            self._equations[_owner_of(equation, self.owner)].append(equation)
        self.slots: list[list[int]] = [[] for _ in range(count)]
        for slot, out in enumerate(self.state_out):
            if self.owner(out) != SHARED:
                self.slots[self.owner(out)].append(slot)

    def run(self, owner: int, read: Callable[[Any], Any]) -> dict[Any, Any]:
        """Return the value of every variable that the owner's equations define."""
        equations = self._equations[owner]
        defined = dict.fromkeys(out for equation in equations for out in equation.outvars)
        wanted = dict.fromkeys(
            var
            for equation in equations
            for var in equation.invars
            if not isinstance(var, Literal) and var not in defined
        )
        part = self._jaxpr.replace(
            constvars=[], invars=list(wanted), outvars=list(defined), eqns=equations
        )
        values = jaxpr_as_fun(ClosedJaxpr(part, []))(*map(read, wanted))
        return dict(zip(defined, values, strict=True))

    def hold_entrywise(self, index: int) -> None:
        """Raise unless the update is entrywise, so that a stack's layers can be updated alone."""
        shape = _shape(self.params_in[index])
        uniform = _uniform(self._equations[SHARED])

        def fits(var: Any) -> bool:
            if self.owner(var) == SHARED:
                return not _shape(var) or var in uniform
            return _shape(var) == shape

        def refuse(why: str) -> None:
            raise ValueError(
                f"fused: the update of params{self.names[index]}, which repeat stacks, {why}; use "
                "fused=False"
            )

        for equation in self._equations[index]:
            if equation.primitive.name not in ENTRYWISE:
                refuse(
                    f"looks at more than one entry at a time ({equation.primitive}), so that no "
                    "layer can be updated alone"
                )
            if not all(map(fits, equation.invars)):
                refuse(
                    f"uses more than one entry, or number, at a time ({equation.primitive}), so "
                    "that no layer can be updated alone"
                )
        slots = self.slots[index]
        before = self.params_in[index], *(self.state_in[slot] for slot in slots)
        after = self.params_out[index], *(self.state_out[slot] for slot in slots)
        for old, new in zip(before, after, strict=True):
            if not fits(new) or _dtype(new) != _dtype(old):
                refuse(f"makes {_dtype(new)}{_shape(new)} of {_dtype(old)}{_shape(old)}")

    def _owners(self, equations: list[JaxprEqn]) -> Callable[[Any], int]:
        """Return a function from a variable to its owner, the param that it depends on.

        A variable depends on a param through the param's value, gradient or state. An array of the
        state belongs to the param that its next value depends on. That may give more variables an
        owner, so the search is repeated until it finds nothing new.
        """
        start = {var: index for index, var in enumerate(self.grads_in)}
        start |= {var: index for index, var in enumerate(self.params_in)}
        while True:
            found = dict(start)

            def owner(var: Any, found: dict[Any, int] = found) -> int:
                return SHARED if isinstance(var, Literal) else found.get(var, SHARED)

            for equation in equations:
                found |= dict.fromkeys(equation.outvars, _owner_of(equation, owner))
            before = dict(start)
            start |= zip(self.state_in, map(owner, self.state_out), strict=True)
            if start == before:
                return owner

    def _hold_apart(self, equations: list[JaxprEqn]) -> None:
        for index, out in enumerate(self.params_out):
            if self.owner(out) not in (index, SHARED):
                first = next(e for e in equations if _owner_of(e, self.owner) == ACROSS)
                raise ValueError(
                    "fused: each param is updated alone, but this optimizer's update of "
                    f"params{self.names[index]} looks at others too ({first.primitive}); use "
                    "fused=False, or for clipping by the global norm max_norm in place of "
                    "optax.clip_by_global_norm"
                )
        for name, out in zip(self._states, self.state_out, strict=True):
            if self.owner(out) == ACROSS:
                raise ValueError(
                    "fused: each param is updated alone, but this optimizer's "
                    f"state{name} looks at several; use fused=False"
                )
        for equation in equations:
            if equation.effects and _owner_of(equation, self.owner) == ACROSS:
                raise ValueError(
                    f"fused: each param is updated alone, but {equation.primitive} in this "
                    "optimizer looks at several; use fused=False"
                )


def _owner_of(equation: JaxprEqn, owner: Callable[[Any], int]) -> int:
    owners = set(map(owner, equation.invars)) - {SHARED}
    return ACROSS if len(owners) > 1 else max(owners, default=SHARED)


def _needed(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """Return the equations that a result depends on, and those with an effect, such as printing."""
    wanted, kept = {var for var in jaxpr.outvars if not isinstance(var, Literal)}, []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or wanted.intersection(equation.outvars):
            wanted |= {var for var in equation.invars if not isinstance(var, Literal)}
            kept.append(equation)
    return kept[::-1]


def _uniform(equations: list[JaxprEqn]) -> set[Any]:
    """Return the outputs that hold a single value, computed or broadcast from scalars."""
    uniform: set[Any] = set()
    for equation in equations:
        spread = equation.primitive.name in ENTRYWISE | {"broadcast_in_dim"}
        scalars = (not _shape(var) or var in uniform for var in equation.invars)
        if spread and all(scalars):
            uniform.update(equation.outvars)
    return uniform


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _dtype(var: Any) -> Any:
    return var.aval.dtype


def value_of(var: Any, read: Callable[[Any], Any]) -> Any:
    """Return the value of a variable, or of a literal."""
    return var.val if isinstance(var, Literal) else read(var)

"""A function with other backward rules for chosen parts of its program."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from jaxprop.core.arrays import is_inexact
from jaxprop.core.checks import given
from jaxprop.core.combinator import runs
from jaxprop.core.layer import Layer
from jaxprop.core.types import Params, PyTree
from jaxprop.traced.equations import (
    Program,
    branches_of,
    evaluate,
    inlined,
    name_of,
    primitive_of,
    rematerialized,
    rule_of,
    scan_of,
    struct,
    variables,
)
from jaxprop.traced.part import PartLayer, turned
from jaxprop.traced.stages import moving_in

Rule: TypeAlias = Callable[[Any], Layer]
"""A function of a layer that returns the layer with another backward."""
Names: TypeAlias = tuple[str, ...]
AFFINE = frozenset(
    (
        *("add", "add_any", "sub", "neg", "reshape", "transpose", "broadcast_in_dim", "squeeze"),
        *("convert_element_type", "copy", "slice", "split", "concatenate"),
        *("reduce_sum", "pad", "rev"),
    )
)
BILINEAR = frozenset(("dot_general", "conv_general_dilated", "mul", "div"))


@dataclasses.dataclass(frozen=True)
class Ruled:
    """``fn(params, x)`` with other backward rules for chosen parts.

    Attributes:
        fn: the function.
        rules: pairs of a key and a rule, which is called with the part as a layer.
    """

    fn: Callable[..., PyTree]
    rules: tuple[tuple[str, Rule], ...]

    def __post_init__(self) -> None:
        for key, rule in self.rules:
            if not isinstance(key, str) or not all(key.split("/")):
                raise TypeError(
                    "function: rules are by the name of a primitive, a function or a scope, such "
                    f"as 'Dense_0/dot_general', not {key!r}"
                )
            if isinstance(rule, type | Layer) or not callable(rule):
                raise TypeError(
                    f"function: rules[{key!r}] is a function of a layer, such as "
                    f"jp.rules.sign_symmetric, not {given(rule)}"
                )

        object.__setattr__(self, "__qualname__", self.name)

    @property
    def name(self) -> str:
        """The function's name."""
        return getattr(self.fn, "__qualname__", repr(self.fn))

    def __call__(self, params: Params, x: PyTree) -> PyTree:
        (ps, of_params), (xs, of_x) = map(jax.tree.flatten, (params, x))
        found: list[Any] = []

        def flat(ps: list[Any], xs: list[Any]) -> list[Any]:
            outs, structure = jax.tree.flatten(self.fn(of_params.unflatten(ps), of_x.unflatten(xs)))
            found.append(structure)
            return outs

        program = Program.of(jax.make_jaxpr(flat)(ps, xs)).within()
        ruling = _Ruling(dict(self.rules))
        outs = ruling.run(program, [*ps, *xs], [False] * len(ps) + [True] * len(xs), ())
        for key, _ in self.rules:
            if key not in ruling.used:
                raise ValueError(
                    f"function: rules[{key!r}] is for no part of {self.name} that the rules before "
                    f"it leave; there are {', '.join(sorted(ruling.seen))}"
                )
        return found[-1].unflatten(outs)


class _Ruling:
    """One run of a program with rules.

    Attributes:
        used: the keys that matched a part.
        seen: all names that a key could match.
    """

    def __init__(self, rules: dict[str, Rule]) -> None:
        self._rules, self._numbers = rules, itertools.count()
        self.used: set[str] = set()
        self.seen: set[str] = set()

    def run(
        self, program: Program, args: Sequence[Any], of_x: Sequence[bool], scope: Names
    ) -> list[Any]:
        """Return the program's outputs.

        Args:
            program: the program.
            args: its inputs.
            of_x: for each of them, whether it depends on the function's x.
            scope: the names of the scopes around the program.
        """
        jaxpr = program.jaxpr
        moving = moving_in(program, list(itertools.compress(jaxpr.invars, of_x)))
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
        values |= zip(jaxpr.invars, args, strict=True)

        def read(atoms: Sequence[Any]) -> tuple[list[Any], list[bool]]:
            numbers = [isinstance(atom, Literal) for atom in atoms]
            moves = [not n and atom in moving for n, atom in zip(numbers, atoms, strict=True)]
            each = zip(numbers, atoms, strict=True)
            return [jnp.asarray(a.val, struct(a).dtype) if n else values[a] for n, a in each], moves

        for key, equations in self._grouped(jaxpr.eqns, scope):
            if key is None:
                (equation,) = equations
                around = (*scope, *_scopes(equation))
                outs = equation.outvars
                made = self._step(equation, *read(equation.invars), around)
            else:
                part = _part(program, equations)
                outs = part.jaxpr.outvars
                ins, moves = read(part.jaxpr.invars)
                where = "/".join(_scopes(equations[0]))
                made = self._by_rule(key, part, ins, moves, where) if outs else []
            values |= zip(outs, made, strict=True)
        return read(jaxpr.outvars)[0]

    def _grouped(
        self, equations: Sequence[JaxprEqn], scope: Names
    ) -> Iterator[tuple[str | None, list[JaxprEqn]]]:
        """Yield each equation with its rule's key or None; a scope with a rule is yielded whole."""
        for (key, _), group in itertools.groupby(
            enumerate(equations), lambda each: self._key(*each, scope)
        ):
            yield key, [equation for _, equation in group]

    def _key(self, number: int, equation: JaxprEqn, scope: Names) -> tuple[str | None, int | Names]:
        """Return the rule's key or None, and what to group by: a matched scope, or the number."""
        around = (*scope, *_scopes(equation))
        names = {primitive_of(equation), name_of(equation), rule_of(equation)} - {""}
        self.seen |= names | set(around)
        for key in self._rules:
            *outer, last = key.split("/")
            if last in names and _end_of(outer, around) is not None:
                self.used.add(key)
                return key, number
            if (end := _end_of([*outer, last], around)) is not None:
                self.used.add(key)
                return key, around[:end]
        return None, number

    def _step(
        self, equation: JaxprEqn, ins: list[Any], of_x: list[bool], scope: Names
    ) -> list[Any]:
        if equation.primitive.name == "scan":
            return self._scan(equation, ins, of_x, scope)
        if equation.primitive.name == "cond":
            index, *args = ins
            branches = [self._run(each, of_x[1:], scope) for each in branches_of(equation)]
            return jax.lax.switch(jnp.asarray(index, jnp.int32), branches, *args)
        if (again := rematerialized(equation)) is not None:
            program, options = again
            return jax.checkpoint(self._run(program, of_x, scope), **options)(*ins)
        if (program := inlined(equation)) is not None:
            return self.run(program, ins, of_x, scope)
        return evaluate(equation, ins)

    def _run(
        self, program: Program, of_x: Sequence[bool], scope: Names
    ) -> Callable[..., list[Any]]:
        return lambda *args: self.run(program, args, of_x, scope)

    def _scan(
        self, equation: JaxprEqn, ins: list[Any], of_x: list[bool], scope: Names
    ) -> list[Any]:
        scan = scan_of(equation)
        start, stop = scan.carried.start, scan.carried.stop
        of_x = [*of_x[:start], *[any(of_x)] * scan.carry, *of_x[stop:]]

        def step(carried: list[Any], here: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = self.run(scan.body, [*ins[:start], *carried, *here], of_x, scope)
            return outs[: scan.carry], outs[scan.carry :]

        carried, outs = jax.lax.scan(step, ins[start:stop], ins[stop:], **scan.options)
        return [*carried, *outs]

    def _by_rule(
        self, key: str, part: Program, ins: list[Any], of_x: list[bool], scope: str
    ) -> list[Any]:
        if not any(of_x):
            of_x = list(map(is_inexact, ins))
        xs = tuple(itertools.compress(ins, of_x))
        params = tuple(itertools.compress(ins, [not here for here in of_x]))

        def run(params: Sequence[Any], x: Any) -> PyTree:
            xs, others = iter(x if isinstance(x, tuple) else (x,)), iter(params)
            outs = part.run([next(xs if here else others) for here in of_x], evaluate)
            return outs[0] if len(outs) == 1 else tuple(outs)

        others = tuple(sorted(_not_affine(part, of_x)))
        of_data = len(xs) > 1 and not any(map(is_inexact, params))
        layer = self._rules[key](PartLayer(key, next(self._numbers), run, others, of_data))
        if not isinstance(layer, Layer):
            raise TypeError(f"function: rules[{key!r}] returns a layer, not {given(layer)}")
        if any(inner.layer.takes for inner in runs(layer)):
            raise TypeError(
                f"function: {layer} takes a key or a mask, and a part of a function has none"
            )
        x = xs[0] if len(xs) == 1 else xs
        y = turned(layer, params, x, run, scope)
        return list(y) if isinstance(y, tuple) else [y]


def _scopes(equation: JaxprEqn) -> Names:
    """Return the names of the scopes of an equation, without the transformations around them."""
    names = str(equation.source_info.name_stack).split("/")
    return tuple(filter(None, (re.sub(r"^(\w+\()+|\)+$", "", name) for name in names)))


def _end_of(some: Sequence[str], names: Names) -> int | None:
    """Return where ``some`` first ends as a run within ``names``; None if it is not in them."""
    size = len(some)
    starts = range(len(names) - size + 1)
    return next((at + size for at in starts if names[at : at + size] == tuple(some)), None)


def _not_affine(program: Program, of_x: Sequence[bool]) -> set[str]:
    """Return the names of the primitives that are not affine in what depends on x."""
    moving = moving_in(program, list(itertools.compress(program.jaxpr.invars, of_x)))
    found: set[str] = set()
    for equation in program.jaxpr.eqns:
        name = primitive_of(equation)
        moves = [not isinstance(atom, Literal) and atom in moving for atom in equation.invars]
        if (inner := inlined(equation)) is not None:
            found |= _not_affine(inner, moves)
        elif any(moves) and name not in AFFINE and not (sum(moves) == 1 and name in BILINEAR):
            found.add(name)
    return found


def _part(program: Program, equations: Sequence[JaxprEqn]) -> Program:
    """Return the program of some consecutive equations."""
    jaxpr = program.jaxpr
    made = [var for equation in equations for var in equation.outvars]
    inside = {*made, *jaxpr.constvars}
    others = [
        equation for equation in jaxpr.eqns if all(equation is not each for each in equations)
    ]
    wanted = set(variables([*jaxpr.outvars, *(a for each in others for a in each.invars)]))
    taken = variables(atom for equation in equations for atom in equation.invars)
    ins = list(dict.fromkeys(var for var in taken if var not in inside))
    return program.part(ins, [var for var in made if var in wanted], equations)

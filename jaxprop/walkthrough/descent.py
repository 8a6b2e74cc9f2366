"""Gradient descent on a small network, with every number of the chain rule.

For a weight w from a source s into a unit with weighted sum z and value a, the chain rule is
dE/dw = dE/da * da/dz * dz/dw with dz/dw = s (for a bias, 1); for a unit below, dE/ds is the sum
of dE/dz * w over the units that s feeds.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import loss_fn
from jaxprop.explanation.record import explain
from jaxprop.explanation.terms import Explanation
from jaxprop.layers import AffineParams
from jaxprop.losses import HalfSquaredError
from jaxprop.training.update import make_update
from jaxprop.walkthrough import config as configs
from jaxprop.walkthrough.config import Config
from jaxprop.walkthrough.document import Final, Path, Stage, Unit, Walkthrough, Weight

CURVE = 1000  # intervals of the error curve, at most


def walkthrough(config: Config, steps: int = 1) -> Walkthrough:
    """Return the first step of gradient descent, and the state after the last, in float64.

    Args:
        config: the network.
        steps: the number of steps to descend.
    """
    return descent(config, steps, 1)[0][0]


def descent(config: Config, steps: int, shown: int) -> list[tuple[Walkthrough, Explanation]]:
    """Return each of the first steps of gradient descent, with the explanation behind its numbers.

    Args:
        config: the network.
        steps: the number of steps to descend.
        shown: the number of steps to return, from the first.
    """
    with jax.enable_x64(True):
        net, loss = configs.network(config), HalfSquaredError()
        optimizer = optax.sgd(config.learning_rate)
        update, scalar = make_update(net, loss, optimizer), loss_fn(net, loss)
        x, target = configs.example(config)

        @jax.jit
        def descend(params: Params, gaps: Array) -> tuple[Params, Array, Array]:
            """Return the params after all gaps, E before each, and how many steps had finite E."""

            def step(_: Array, carry: _Carry) -> _Carry:
                params, state, value = update(carry.params, carry.state, x, target)
                finite = carry.finite & jnp.isfinite(value)
                return _Carry(
                    params, state, finite, jnp.where(finite, carry.steps + 1, carry.steps)
                )

            def stretch(carry: _Carry, gap: Array) -> tuple[_Carry, Array]:
                return jax.lax.fori_loop(0, gap, step, carry), scalar(carry.params, x, target)

            start = _Carry(params, optimizer.init(params), jnp.array(True), jnp.array(0))
            end, errors = jax.lax.scan(stretch, start, gaps)
            return end.params, errors, end.steps

        explained = functools.partial(explain, net, loss, x=x, target=target, keep=sys.maxsize)
        differentiate = jax.jit(jax.grad(scalar))
        params = configs.params(config)
        marks = sorted({round(steps * i / CURVE) for i in range(CURVE + 1)})
        params_last, errors, finite = descend(params, jnp.diff(jnp.array(marks)))
        names, terms, last = _Names(config), explained(params), explained(params_last)
        recorded = _recorded(config, last)
        final = Final(
            steps=steps,
            error=float(last.value),
            outputs=dict(zip(names.units[-1], recorded[-1].value, strict=True)),
            weights=names.by_name(params_last),
            slopes={
                name: slope
                for units, layer in zip(names.units, recorded, strict=True)
                for name, slope in zip(units, layer.slope, strict=True)
            },
            nonfinite_after=None
            if int(finite) == steps and math.isfinite(last.value)
            else int(finite),
        )
        curve = tuple(zip(marks, [*errors.tolist(), final.error], strict=True))
        walks = []
        for _ in range(shown):
            params_after, _, _ = descend(params, jnp.array([1]))
            terms_after = explained(params_after)
            before, after = _recorded(config, terms), _recorded(config, terms_after)
            numbers = _Numbers(
                products=names.by_name([recorded.grads for recorded in before]),
                grads=names.by_name(differentiate(params, x, target)),
                old=names.by_name(params),
                new=names.by_name(params_after),
            )
            walk = Walkthrough(
                config=config,
                stages=tuple(
                    _stage(config, names, numbers, before, after, index)
                    for index in range(len(config.layers))
                ),
                error=float(terms.value),
                error_after=float(terms_after.value),
                largest_difference=_largest_difference(numbers),
                curve=curve,
                final=final,
            )
            walks.append((walk, terms))
            params, terms = params_after, terms_after
        return walks


class _Names:
    """The names of a network's numbers.

    Inputs are named x, hidden units h and outputs o; weighted sums z, biases b and weights w. All
    are numbered unit by unit.
    """

    def __init__(self, config: Config) -> None:
        self.inputs = [_numbered("x", 0, len(config.inputs))]
        self.units, self.sums, self.weights, self.biases = [], [], [], []
        units = weights = 0
        for index, layer in enumerate(config.layers):
            width, fan_in = len(layer.weights), len(self.inputs[-1])
            is_output = index == len(config.layers) - 1
            self.units.append(
                _numbered("o", 0, width) if is_output else _numbered("h", units, width)
            )
            self.sums.append(_numbered("z", units, width))
            self.biases.append(_numbered("b", units, width))
            self.weights.append(
                [_numbered("w", weights + unit * fan_in, fan_in) for unit in range(width)]
            )
            self.inputs.append(self.units[-1])
            units, weights = units + width, weights + width * fan_in

    def by_name(self, params: Params) -> dict[str, float]:
        """Return the numbers in params, or in their gradients, by the names of the weights."""
        affines = [affine for affine in params if isinstance(affine, AffineParams)]
        named: dict[str, float] = {}
        for rows, biases, affine in zip(self.weights, self.biases, affines, strict=True):
            for row, column in zip(rows, affine.w.T.tolist(), strict=True):
                named |= zip(row, column, strict=True)
            if affine.b is not None:
                named |= zip(biases, affine.b.tolist(), strict=True)
        return named


class _Carry(NamedTuple):
    """The state of the descent, whether E was finite in all steps so far, and in how many."""

    params: Params
    state: PyTree
    finite: Array
    steps: Array


class _Numbers(NamedTuple):
    """Numbers of each weight, by its name: both gradients, and the weight before and after."""

    products: dict[str, float]
    grads: dict[str, float]
    old: dict[str, float]
    new: dict[str, float]


def _largest_difference(numbers: _Numbers) -> float:
    """Return the largest difference between both gradients; equal infinities differ by 0."""
    by_hand, by_jax = (np.array(list(each.values())) for each in (numbers.products, numbers.grads))
    with np.errstate(invalid="ignore"):
        different = np.abs(by_hand - by_jax)
    return float(np.max(np.where(by_hand == by_jax, 0, different)))


class _Recorded(NamedTuple):
    """The terms of a dense layer and the activation after it, unit by unit."""

    below: list[float]
    z: list[float]
    value: list[float]
    d_value: list[float]
    slope: list[float]
    d_z: list[float]
    grads: AffineParams


def _recorded(config: Config, terms: Explanation) -> list[_Recorded]:
    """Return the terms of each layer of the config."""
    ahead = iter(terms.layers.values())
    recorded = []
    for units in config.layers:
        dense = next(ahead)
        active = dense if configs.ACTIVATIONS[units.activation] is None else next(ahead)
        slope = jnp.ones_like(active.y) if active.slope is None else active.slope
        rows = (dense.x, dense.y, active.y, active.ct, slope, dense.ct)
        recorded.append(_Recorded(*[row[0].tolist() for row in rows], grads=dense.grads))
    return recorded


def _stage(
    config: Config,
    names: _Names,
    numbers: _Numbers,
    before: list[_Recorded],
    after: list[_Recorded],
    index: int,
) -> Stage:
    """Return one layer of the walkthrough, before and after the step."""
    here, here_after = before[index], after[index]
    is_output = index == len(config.layers) - 1

    def weight(name: str, source: str, unit: int, source_value: float) -> Weight:
        return Weight(
            name=name,
            source=source,
            unit=names.units[index][unit],
            z_name=names.sums[index][unit],
            d_value=here.d_value[unit],
            slope=here.slope[unit],
            source_value=source_value,
            product=numbers.products[name],
            jax_grad=numbers.grads[name],
            old=numbers.old[name],
            new=numbers.new[name],
        )

    def paths(unit: int) -> tuple[Path, ...]:
        if is_output:
            return ()
        above = zip(
            names.sums[index + 1], names.weights[index + 1], before[index + 1].d_z, strict=True
        )
        return tuple(
            Path(z_name, row[unit], d_z, numbers.old[row[unit]]) for z_name, row, d_z in above
        )

    def unit(position: int) -> Unit:
        target = config.targets[position] if is_output else None
        value, value_after = here.value[position], here_after.value[position]
        return Unit(
            name=names.units[index][position],
            z_name=names.sums[index][position],
            z=here.z[position],
            value=value,
            d_value=here.d_value[position],
            paths=paths(position),
            target=target,
            error=None if target is None else 0.5 * (target - value) ** 2,
            z_after=here_after.z[position],
            value_after=value_after,
            error_after=None if target is None else 0.5 * (target - value_after) ** 2,
        )

    hidden = "hidden" if len(config.layers) == 2 else f"hidden-{index + 1}"
    return Stage(
        name="output" if is_output else hidden,
        activation=config.layers[index].activation,
        inputs=tuple(names.inputs[index]),
        units=tuple(map(unit, range(len(names.units[index])))),
        weights=tuple(
            tuple(
                weight(name, source, unit, value)
                for name, source, value in zip(row, names.inputs[index], here.below, strict=True)
            )
            for unit, row in enumerate(names.weights[index])
        ),
        biases=()
        if config.layers[index].biases is None
        else tuple(weight(name, "1", unit, 1.0) for unit, name in enumerate(names.biases[index])),
    )


def _numbered(letter: str, start: int, count: int) -> list[str]:
    """Return names such as h3, h4, h5, for start 2 and count 3."""
    return [f"{letter}{start + i + 1}" for i in range(count)]

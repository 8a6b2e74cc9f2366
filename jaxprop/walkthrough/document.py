"""The walkthrough as plain data, for text, for JSON, and for whatever else draws it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jaxprop.walkthrough.config import Config


class Weight(NamedTuple):
    """One chain: ``product`` is what the hand-written backward gives, d_value * slope * d_z."""

    name: str
    source: str  # the unit or input it comes from; "1" for a bias
    unit: str
    z_name: str
    d_value: float  # dE/d(value of the unit)
    slope: float  # d(value)/dz
    d_z: float  # dz/dw
    product: float
    jax_grad: float
    old: float
    new: float


class Path(NamedTuple):
    """One way by which the error comes back: dE/dz of a unit that is fed, times the weight."""

    z_name: str
    weight_name: str
    d_z: float
    weight: float


class Unit(NamedTuple):
    """z is the weighted sum and value what the activation makes of it, before and after the step.

    ``paths`` are what dE/dvalue is the sum of; an output has none, but a ``target`` and its own
    share of the error, ``error``.
    """

    name: str
    z_name: str
    z: float
    value: float
    d_value: float
    paths: tuple[Path, ...]
    target: float | None
    error: float | None
    z_after: float
    value_after: float
    error_after: float | None


class Stage(NamedTuple):
    """One layer of the drawing: a row of weights for each unit, a bias for each unit or none."""

    name: str
    activation: str
    inputs: tuple[str, ...]
    units: tuple[Unit, ...]
    weights: tuple[tuple[Weight, ...], ...]
    biases: tuple[Weight, ...]

    def chains(self) -> list[Weight]:
        return [weight for row in self.weights for weight in row] + list(self.biases)


class Final(NamedTuple):
    """The state after the last step."""

    steps: int
    error: float
    outputs: dict[str, float]
    weights: dict[str, float]


class Walkthrough(NamedTuple):
    config: Config
    stages: tuple[Stage, ...]
    error: float
    error_after: float
    largest_difference: float  # between the hand-written chain and jax.grad, over all weights
    curve: tuple[tuple[int, float], ...]  # (steps taken, E), at most CURVE + 1 of them, evenly
    final: Final

    def chains(self) -> list[Weight]:
        return [weight for stage in self.stages for weight in stage.chains()]

    def document(self, weight: str | None = None) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, of everything or of one weight's chain.

        JSON has no NaN and no infinity: None stands in their place.
        """
        if weight is None:
            return _plain(self)
        return next(_plain(chain) for chain in self.chains() if chain.name == weight)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _plain(field) for key, field in value._asdict().items()}  # pyright: ignore
    if isinstance(value, dict):
        return {key: _plain(field) for key, field in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""The walkthrough as plain data, from which the text, the JSON and the page are made."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jaxprop.walkthrough.config import Activation, Config


class Weight(NamedTuple):
    """The chain rule for one weight: dE/dw = dE/dvalue * dvalue/dz * dz/dw.

    Attributes:
        name: the weight's name.
        source: the unit or the input that it comes from; "1" for a bias.
        unit: the unit that it leads to.
        z_name: the name of that unit's weighted sum z.
        d_value: dE/dvalue, where value is the unit's.
        slope: dvalue/dz.
        source_value: the value of the source, which is dz/dw; 1 for a bias.
        product: dE/dw by the hand-written backward pass.
        jax_grad: dE/dw by ``jax.grad``.
        old: the weight before the step.
        new: the weight after the step.
    """

    name: str
    source: str
    unit: str
    z_name: str
    d_value: float
    slope: float
    source_value: float
    product: float
    jax_grad: float
    old: float
    new: float


class Path(NamedTuple):
    """One path by which the error comes back to a unit: dE/dz of a unit above, times the weight.

    Attributes:
        z_name: the name of the weighted sum z of the unit above.
        weight_name: the name of the weight that leads to it.
        d_z: dE/dz.
        weight: the weight.
    """

    z_name: str
    weight_name: str
    d_z: float
    weight: float


class Unit(NamedTuple):
    """One unit, before and after the step.

    Attributes:
        name: the unit's name.
        z_name: the name of its weighted sum.
        z: the weighted sum.
        value: the activation of z.
        d_value: dE/dvalue.
        paths: the paths that sum to ``d_value``; none for an output.
        target: the target of an output; None for a hidden unit.
        error: an output's share of the error; None for a hidden unit.
        z_after: z after the step.
        value_after: the value after the step.
        error_after: the share of the error after the step; None for a hidden unit.
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
    """One layer of the network.

    Attributes:
        name: "output", "hidden", or "hidden-1" where there are several hidden layers.
        activation: the name of the activation.
        inputs: the names of the units, or inputs, below.
        units: the units.
        weights: a row for each unit, with a weight for each of the inputs.
        biases: a bias for each unit; empty for a layer without biases.
    """

    name: str
    activation: Activation
    inputs: tuple[str, ...]
    units: tuple[Unit, ...]
    weights: tuple[tuple[Weight, ...], ...]
    biases: tuple[Weight, ...]

    def chains(self) -> list[Weight]:
        """Return the chain of each weight and of each bias."""
        return [weight for row in self.weights for weight in row] + list(self.biases)


class Final(NamedTuple):
    """The state after the last step.

    Attributes:
        steps: the number of steps taken.
        error: the error.
        outputs: the value of each output, by name.
        weights: each weight and each bias, by name.
        slopes: dvalue/dz of each unit, by name.
        nonfinite_after: the least number of steps after which the error is not finite; None for
            a descent whose error is finite throughout.
    """

    steps: int
    error: float
    outputs: dict[str, float]
    weights: dict[str, float]
    slopes: dict[str, float]
    nonfinite_after: int | None


class Walkthrough(NamedTuple):
    """One step of gradient descent, the error curve of the whole descent, and its end.

    Attributes:
        config: the network.
        stages: the layers, the one nearest the inputs first.
        error: the error E before the step.
        error_after: the error after it.
        largest_difference: the largest difference between a weight's derivative by hand and by
            ``jax.grad``.
        curve: pairs (steps taken, E), evenly spaced over the whole descent.
        final: the state after the last step.
    """

    config: Config
    stages: tuple[Stage, ...]
    error: float
    error_after: float
    largest_difference: float
    curve: tuple[tuple[int, float], ...]
    final: Final

    def chains(self) -> list[Weight]:
        """Return the chain of each weight and of each bias, in all layers."""
        return [weight for stage in self.stages for weight in stage.chains()]

    def document(self, weight: str | None = None) -> dict[str, Any]:
        """Return the walkthrough as dicts, lists, strings and numbers, ready for JSON.

        The keys are the attributes of ``Walkthrough``, and inside it those of ``Config``,
        ``Units``, ``Stage``, ``Unit``, ``Path``, ``Weight`` and ``Final``: their docstrings say
        what each is. JSON has no NaN and no infinity: None stands in their place.

        Args:
            weight: the name of the one weight whose chain is returned; None for everything.
        """
        if weight is None:
            return _plain(self)
        return next(_plain(chain) for chain in self.chains() if chain.name == weight)


def _plain(value: object) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _plain(field) for key, field in value._asdict().items()}  # pyright: ignore
    if isinstance(value, dict):
        return {key: _plain(field) for key, field in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

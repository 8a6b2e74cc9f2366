"""The network of a walkthrough: read from a TOML file, and written to one."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.combinators.chain import Chain, chain
from jaxprop.core.layer import Layer
from jaxprop.core.types import Params
from jaxprop.layers import AffineParams, Dense, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh

Activation = Literal["sigmoid", "tanh", "relu", "gelu", "silu", "softplus", "none"]

ACTIVATIONS: dict[Activation, Layer | None] = {
    "sigmoid": Sigmoid(),
    "tanh": Tanh(),
    "relu": Relu(),
    "gelu": Gelu(),
    "silu": Silu(),
    "softplus": Softplus(),
    "none": None,
}


MOST_WEIGHTS = 1_000_000  # that are drawn at random for one layer


class ConfigError(Exception):
    """An error in a network file or on the command line, in one line that names the key."""


class Units(NamedTuple):
    """One layer of units.

    Attributes:
        activation: the name of the activation; "none" for a layer without one.
        weights: a row for each unit, with a number for each unit (or input) below.
        biases: a number for each unit; None for a layer without biases.
    """

    activation: Activation
    weights: tuple[tuple[float, ...], ...]
    biases: tuple[float, ...] | None = None


class Config(NamedTuple):
    """A network, one example, and a learning rate.

    Attributes:
        inputs: the values of the inputs.
        targets: the target of each output.
        learning_rate: the step size of gradient descent.
        layers: the layers, the one nearest the inputs first.
    """

    inputs: tuple[float, ...]
    targets: tuple[float, ...]
    learning_rate: float
    layers: tuple[Units, ...]


WORKED_EXAMPLE = Config(
    inputs=(0.1, 0.2),
    targets=(0.4, 0.6),
    learning_rate=0.5,
    layers=(
        Units("sigmoid", weights=((0.3, 0.25), (0.4, 0.35))),
        Units("sigmoid", weights=((0.45, 0.4), (0.7, 0.6))),
    ),
)


def network(config: Config) -> Chain:
    """Return the config's network: dense layers, each with its activation after it."""
    layers: list[Layer] = []
    for units in config.layers:
        layers.append(Dense(len(units.weights), bias=units.biases is not None))
        activation = ACTIVATIONS[units.activation]
        if activation is not None:
            layers.append(activation)
    return chain(*layers)


def params(config: Config) -> Params:
    """Return the config's weights as the params of its network.

    A file has one *row* for each unit, as networks are drawn: z1 = w1 x1 + w2 x2. The library
    computes x @ w, where w has one *column* for each unit, hence the transpose.
    """
    placed: list[AffineParams | tuple[()]] = []
    for units in config.layers:
        biases = None if units.biases is None else _array(units.biases)
        placed.append(AffineParams(_array(units.weights).T, biases))
        if ACTIVATIONS[units.activation] is not None:
            placed.append(())
    return tuple(placed)


def example(config: Config) -> tuple[Array, Array]:
    """Return x and target, as a batch of one."""
    return _array([config.inputs]), _array([config.targets])


def load(path: str) -> Config:
    """Return the config in a TOML file.

    Args:
        path: the path of the file.

    Raises:
        ConfigError: for a file that cannot be read, is not TOML, or does not describe a network.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not a TOML file: nested too deeply") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    try:
        return parse(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(table: dict[str, Any]) -> Config:
    """Return the config in a table of a TOML file.

    Args:
        table: the table, with the keys that ``dump`` writes.

    Raises:
        ConfigError: for a key that is unknown, missing, or has a value that does not fit.
    """
    _known(table, "", {"inputs", "targets", "learning_rate", "layers", "seed"})
    inputs = _numbers(_get(table, "inputs"), "inputs")
    targets = _numbers(_get(table, "targets"), "targets")
    rate = _number(_get(table, "learning_rate"), "learning_rate")
    seed = _whole(table.get("seed", 0), "seed", least=0)
    entries = _get(table, "layers")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            "layers must be one [[layers]] table or more, the first nearest the inputs"
        )
    layers: list[Units] = []
    width = len(inputs)
    for index, entry in enumerate(entries):
        layers.append(_units(entry, f"layers[{index}]", width, jax.random.key(seed), index))
        width = len(layers[-1].weights)
    if len(targets) != width:
        raise ConfigError(
            f"targets has {len(targets)} numbers, but the last layer has {width} units"
        )
    return Config(inputs, targets, rate, tuple(layers))


def dump(config: Config) -> str:
    """Return the config as TOML, which ``load`` reads back to the same numbers."""
    lines = [
        "# A network for: jaxprop walkthrough --config FILE",
        "# Each layer is a table, the first nearest the inputs. activation is",
        f"# one of {', '.join(ACTIVATIONS)}.",
        "# weights has a row for each unit, with a number for each unit (or input)",
        "# below; biases, if there are any, has a number for each unit. In their place,",
        "# units = 3 (and bias = true) draws random weights, the same ones for the same",
        "# seed = 0 at the top.",
        f"inputs = {_toml(config.inputs)}",
        f"targets = {_toml(config.targets)}",
        f"learning_rate = {config.learning_rate!r}",
    ]
    for units in config.layers:
        lines += ["", "[[layers]]", f'activation = "{units.activation}"', "weights = ["]
        lines += [f"    {_toml(row)}," for row in units.weights]
        lines += ["]"]
        if units.biases is not None:
            lines += [f"biases = {_toml(units.biases)}"]
    return "\n".join(lines) + "\n"


def _units(entry: object, key: str, width: int, seed: Array, index: int) -> Units:
    """Return the layer in the table named ``key``; width is the number of units below it."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{key} must be a table, not {entry!r}")
    _known(entry, f"{key}.", {"activation", "weights", "biases", "units", "bias"})
    activation = _get(entry, "activation", f"{key}.")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(
            f"{key}.activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )
    if "units" in entry:
        for other in ("weights", "biases"):
            if other in entry:
                raise ConfigError(f"{key} has both units and {other}; units draws them at random")
        bias = entry.get("bias", False)
        if not isinstance(bias, bool):
            raise ConfigError(f"{key}.bias must be true or false, not {bias!r}")
        units = _whole(entry["units"], f"{key}.units", least=1, most=10_000)
        if units * width > MOST_WEIGHTS:
            raise ConfigError(
                f"{key} has {units} x {width} weights; there is a chain for each, of at most "
                f"{MOST_WEIGHTS:,} in a layer"
            )
        return _drawn(activation, units, bias, width, jax.random.fold_in(seed, index))
    if "bias" in entry:
        raise ConfigError(f"{key}.bias goes with units; beside weights, write biases = [...]")
    rows = _get(entry, "weights", f"{key}.")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{key}.weights must be a list with a row of numbers for each unit")
    weights = tuple(_numbers(row, f"{key}.weights[{i}]") for i, row in enumerate(rows))
    for i, row in enumerate(weights):
        if len(row) != width:
            below = "inputs" if index == 0 else "units in the layer below"
            raise ConfigError(f"{key}.weights[{i}] has {len(row)} numbers for {width} {below}")
    biases = None
    if "biases" in entry:
        biases = _numbers(entry["biases"], f"{key}.biases")
        if len(biases) != len(weights):
            raise ConfigError(f"{key}.biases has {len(biases)} numbers for {len(weights)} units")
    return Units(activation, weights, biases)


def _drawn(activation: Activation, units: int, bias: bool, width: int, key: Array) -> Units:
    """Return a layer with random weights."""
    drawn = Dense(units, bias).init(key, jax.ShapeDtypeStruct((1, width), jnp.float32))
    biases = tuple(drawn.b.tolist()) if bias else None
    return Units(activation, tuple(map(tuple, drawn.w.T.tolist())), biases)


def _get(table: dict[str, Any], key: str, where: str = "") -> object:
    if key not in table:
        raise ConfigError(f"{where}{key} is missing")
    return table[key]


def _known(table: dict[str, Any], where: str, keys: set[str]) -> None:
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, sorted(keys), 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(keys))}"
            raise ConfigError(f"{where}{key} is not a key; {hint}")


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{key} is {number}; it must be finite")
    return number


def _numbers(value: object, key: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{key} must be a list of numbers, not {value!r}")
    return tuple(_number(item, f"{key}[{i}]") for i, item in enumerate(value))


def _whole(value: object, key: str, least: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{key} must be a whole number from {least} to {most}, not {value!r}")
    return value


def _array(numbers: Sequence[float] | Sequence[Sequence[float]]) -> Array:
    return jnp.asarray(numbers, jnp.float64)


def _toml(numbers: tuple[float, ...]) -> str:
    return f"[{', '.join(map(repr, numbers))}]"

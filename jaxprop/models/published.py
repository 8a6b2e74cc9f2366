"""The published tensors of GPT-2, and the conversion between them and params."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxprop.core.checks import check_count, require
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Params
from jaxprop.layers import AffineParams, NormParams
from jaxprop.models.language import Gpt2Config, gpt2


def gpt2_params(tensors: Mapping[str, ArrayLike]) -> Params:
    """Return the params of ``gpt2``, with ``scan`` and without dropout, from published tensors.

    Args:
        tensors: the tensors by their names in the published safetensors file, with or without
            ``transformer.`` before them. The masks and the copy of the table that some files hold
            are ignored.

    Raises:
        KeyError: for a tensor that is missing.
        TypeError: for tensors that are not a mapping.
        ValueError: for a tensor that a GPT-2 does not have, or of another shape, and for a head
            that is not the table.
    """
    require(tensors, Mapping, "gpt2_params: tensors")
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    layers = _check_names(named)
    _check_shapes(named)

    def affine(name: str) -> AffineParams:
        return AffineParams(stack(f"{name}.weight"), stack(f"{name}.bias"))

    def norm(name: str) -> NormParams:
        return NormParams(stack(f"{name}.weight"), stack(f"{name}.bias"))

    def stack(name: str) -> Array:
        return jnp.stack([jnp.asarray(named[f"h.{layer}.{name}"]) for layer in range(layers)])

    attend = norm("ln_1"), affine("attn.c_attn"), (), affine("attn.c_proj")
    widen = norm("ln_2"), affine("mlp.c_fc"), (), affine("mlp.c_proj")
    table, positions, scale, bias = (
        jnp.asarray(named[name])
        for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    )
    return table, (positions, (attend, widen), NormParams(scale, bias))


ENDS = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
IN_BLOCK = tuple(
    f"{layer}.{kind}"
    for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
)
IGNORED = ("attn.bias", "attn.masked_bias")  # masks, which are not params


def _check_names(named: Mapping[str, ArrayLike]) -> int:
    """Return the number of blocks, after checking that tensors and places match one to one."""
    blocks = {name.split(".")[1] for name in named if name.startswith("h.")}
    layers = len(blocks)
    places = {*ENDS, *(f"h.{layer}.{name}" for layer in range(layers) for name in IN_BLOCK)}
    missing = sorted(places - set(named))
    if missing or not layers:
        first = missing[0] if missing else "h.0.ln_1.weight"
        raise KeyError(f"a GPT-2 of {layers} blocks has a tensor {first!r}, which is missing")
    ignored = {f"h.{layer}.{name}" for layer in range(layers) for name in IGNORED}
    unknown = sorted(set(named) - places - ignored - {"lm_head.weight"})
    if unknown:
        raise ValueError(f"a GPT-2 has no tensor {unknown[0]!r}")
    head = named.get("lm_head.weight")
    if head is not None and not np.array_equal(head, named["wte.weight"]):
        raise ValueError("lm_head.weight is not the table wte.weight, which this GPT-2 scores by")
    return layers


def _check_shapes(named: Mapping[str, ArrayLike]) -> None:
    """Raise ``ValueError`` for a tensor that does not fit the table's number of features."""
    table = np.shape(named["wte.weight"])
    d = table[-1] if table else 0
    of_weights: dict[str, tuple[int | None, ...]] = {
        **{"wte": (None, d), "wpe": (None, d), "ln_1": (d,), "ln_2": (d,), "ln_f": (d,)},
        **{"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d)},
        **{"mlp.c_fc": (d, 4 * d), "mlp.c_proj": (4 * d, d)},
    }
    for name, tensor in named.items():
        layer, _, kind = re.sub(r"^h\.\d+\.", "", name).rpartition(".")
        if layer not in of_weights:
            continue
        got, size = np.shape(tensor), of_weights[layer][0 if kind == "weight" else -1 :]
        rows = got[:1] if size[0] is None else size[:1]
        if got != (*rows, *size[1:]):
            raise ValueError(
                f"{name} has shape {got}, but in a GPT-2 of {d} features it is "
                f"({', '.join('any' if n is None else str(n) for n in size)})"
            )


def gpt2_tensors(params: Params) -> dict[str, Array]:
    """Return the tensors by their published names, the inverse of ``gpt2_params``.

    Args:
        params: the params of ``gpt2`` with ``scan`` and without dropout, or a gradient like them.

    Raises:
        ValueError: for other params.
    """
    if not _is_scanned(params):
        raise ValueError(
            "gpt2_tensors takes the params of a gpt2 with scan and without dropout, not "
            f"{shapes(params)}"
        )
    table, (positions, (attend, widen), last) = params
    tensors = {"wte.weight": table, "wpe.weight": positions}
    tensors |= {"ln_f.weight": last.scale, "ln_f.bias": last.bias}
    norms = {"ln_1": attend[0], "ln_2": widen[0]}
    dense = {"attn.c_attn": attend[1], "attn.c_proj": attend[3]}
    dense |= {"mlp.c_fc": widen[1], "mlp.c_proj": widen[3]}
    stacks = {name: (p.scale, p.bias) for name, p in norms.items()}
    stacks |= {name: (p.w, p.b) for name, p in dense.items()}
    for name, (weights, biases) in stacks.items():
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            tensors[f"h.{layer}.{name}.weight"] = weight
            tensors[f"h.{layer}.{name}.bias"] = bias
    return tensors


def _is_scanned(params: Params) -> bool:
    """Return whether params are those of a gpt2 whose blocks are stacked, without dropout."""
    branch = NormParams, AffineParams, tuple, AffineParams
    match params:
        case (_, (_, (attend, widen), NormParams())):
            for layers in attend, widen:
                if not isinstance(layers, tuple) or tuple(map(type, layers)) != branch:
                    return False
            return np.ndim(attend[0].scale) == 2
    return False


def load_gpt2(path: str | PathLike[str], *, heads: int | None = None) -> tuple[Layer, Params]:
    """Return ``(net, params)`` from a safetensors file of a GPT-2; needs the extra ``[models]``.

    All sizes except ``heads`` are read from the tensors. If there is a ``config.json`` next to the
    file, as for the published models, it must agree with ``heads`` and with what ``gpt2`` computes.

    Args:
        path: the file.
        heads: the number of attention heads; by default that of ``config.json``, or without one a
            head for every 64 features, as in the published models.

    Raises:
        KeyError: for a tensor that is missing.
        ValueError: for a tensor that a GPT-2 does not have, a head that is not the table, heads
            that do not divide the features, and a ``config.json`` that says otherwise.
    """
    from safetensors.numpy import load_file

    if Path(path).is_dir():
        raise ValueError(f"load_gpt2 takes a safetensors file, and {path} is a directory")
    params = gpt2_params(load_file(path))
    table, (positions, (attend, _), _) = params
    (vocab, features), length = np.shape(table), len(positions)
    layers = len(attend[0].scale)
    given = _heads(Path(path).with_name("config.json"), heads)
    each = max(features // 64, 1) if given is None else given
    if features % each:
        raise ValueError(f"heads divides the {features} features, but is {each}")
    return gpt2(Gpt2Config(vocab, length, features, each, layers)), params


COMPUTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def _heads(path: Path, heads: int | None) -> int | None:
    """Return the number of heads, checked against the ``config.json`` if there is one."""
    if heads is not None:
        check_count("heads", heads)
    if not path.is_file():
        return heads
    config = json.loads(path.read_text())
    for name, values in COMPUTED.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"config.json: {name} is {config[name]!r}, but gpt2 has {values[0]!r}")
    of_file = config.get("n_head", heads)
    if heads not in (None, of_file):
        raise ValueError(f"config.json: n_head is {of_file}, not {heads}")
    return of_file

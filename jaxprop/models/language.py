"""GPT-2, and the way from its published tensors to params and back."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprop.combinators.chain import chain
from jaxprop.combinators.recompute import recompute
from jaxprop.combinators.repeat import repeat
from jaxprop.combinators.skip import skip
from jaxprop.combinators.tied import tied
from jaxprop.core.layer import Layer
from jaxprop.layers import (
    AffineParams,
    Attention,
    Dense,
    Dropout,
    Embedding,
    Gelu,
    LayerNorm,
    NormParams,
    Positions,
)


class Gpt2Config(NamedTuple):
    """The sizes of a GPT-2; by default those of the smallest one, 124 M params."""

    vocab: int = 50257
    length: int = 1024
    features: int = 768
    heads: int = 12
    layers: int = 12
    dropout: float = 0.0


def gpt2(config: Gpt2Config, *, scan: bool = True, recomputing: bool = False) -> Layer:
    """GPT-2: token ids (N, T) to logits (N, T, vocab), T at most ``config.length``.

    Learned positions, pre-norm blocks of causal attention and of a dense layer four times as wide,
    the tanh form of gelu, a last LayerNorm, and the embedding's own table for the logits (Radford
    et al. 2019, "Language models are unsupervised multitask learners").

    Args:
        config: the sizes. ``dropout`` is that after the embedding and at the end of each branch
            (none on attention weights); it takes effect where a key is given
            (``net.bind(params, key=key)``).
        scan: the blocks as one ``repeat``, whose params are stacked; else one after the other.
        recomputing: whether a block keeps its input alone, and the way back computes the rest anew.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.models.gpt2(jp.models.Gpt2Config(99, 16, 8, heads=2, layers=3))
        >>> ids = jnp.zeros((1, 5), int)
        >>> net.forward(net.init(jax.random.key(0), ids), ids)[0].shape
        (1, 5, 99)
    """
    drop = (Dropout(config.dropout),) if config.dropout else ()
    d = config.features
    block = chain(
        skip(chain(LayerNorm(), Dense(3 * d), Attention(config.heads), Dense(d), *drop)),
        skip(chain(LayerNorm(), Dense(4 * d), Gelu(), Dense(d), *drop)),
    )
    block = recompute(block) if recomputing else block
    blocks = [repeat(block, config.layers)] if scan else [block] * config.layers
    body = chain(Positions(config.length), *drop, *blocks, LayerNorm())
    return tied(Embedding(config.vocab, d), body)


def gpt2_params(tensors: Mapping[str, Any]) -> Any:
    """The params of ``gpt2`` (with ``scan`` and without dropout) from GPT-2's published tensors.

    ``tensors`` has the names of the published safetensors file, with or without ``transformer.``
    before them; the masks and the copy of the table that some files hold are left out. Raises
    ``KeyError`` for a tensor that is missing.
    """
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    layers = len({name.split(".")[1] for name in named if name.startswith("h.")})

    def affine(name: str) -> AffineParams:
        return AffineParams(stack(f"{name}.weight"), stack(f"{name}.bias"))

    def norm(name: str) -> NormParams:
        return NormParams(stack(f"{name}.weight"), stack(f"{name}.bias"))

    def stack(name: str) -> Any:
        return jnp.stack([jnp.asarray(named[f"h.{layer}.{name}"]) for layer in range(layers)])

    attend = norm("ln_1"), affine("attn.c_attn"), (), affine("attn.c_proj")
    widen = norm("ln_2"), affine("mlp.c_fc"), (), affine("mlp.c_proj")
    table, positions, scale, bias = (
        jnp.asarray(named[name])
        for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")
    )
    return table, (positions, (attend, widen), NormParams(scale, bias))


def gpt2_tensors(params: Any) -> dict[str, Any]:
    """The reverse of ``gpt2_params``: the published names, also for gradients."""
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


def load_gpt2(path: str | PathLike[str], *, heads: int | None = None) -> tuple[Layer, Any]:
    """``(net, params)`` from a safetensors file of a GPT-2; needs the extra ``[models]``.

    The sizes are read off the tensors. ``heads`` is not among them: by default the published
    models' 64 features a head.
    """
    from safetensors.numpy import load_file

    params = gpt2_params(load_file(path))
    table, (positions, (attend, _), _) = params
    (vocab, features), length = np.shape(table), len(positions)
    layers = len(attend[0].scale)
    config = Gpt2Config(vocab, length, features, heads or features // 64, layers)
    return gpt2(config), params

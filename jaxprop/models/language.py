"""GPT-2, and the conversion between its published tensors and params."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxprop.combinators.chain import chain
from jaxprop.combinators.recompute import recompute
from jaxprop.combinators.repeat import repeat
from jaxprop.combinators.skip import skip
from jaxprop.combinators.tied import tied
from jaxprop.core.layer import Layer
from jaxprop.core.types import Params
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
    """The sizes of a GPT-2, by default those of the smallest one, with 124 M params.

    Args:
        vocab: the number of tokens.
        length: the number of positions.
        features: the width of the network.
        heads: the number of attention heads.
        layers: the number of blocks.
        dropout: the rate after the embedding and at the end of each branch.
    """

    vocab: int = 50257
    length: int = 1024
    features: int = 768
    heads: int = 12
    layers: int = 12
    dropout: float = 0.0


def gpt2(config: Gpt2Config, *, scan: bool = True, recomputing: bool = False) -> Layer:
    """Return GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners").

    It has learned positions, pre-norm blocks of causal attention and of a dense layer four times as
    wide, the tanh form of gelu, and a last LayerNorm. The embedding's own table gives the logits.

    Dropout takes effect where a key is given (``net.bind(params, key=key)``). Attention weights are
    not dropped.

    Args:
        config: the sizes.
        scan: whether the blocks are one ``repeat``, whose params are stacked, instead of a layer
            each.
        recomputing: whether a block saves only its input, and the walk back recomputes the rest
            (remat).

    Returns:
        A net from token ids (N, T), integers, to logits (N, T, vocab), with T at most
        ``config.length``.

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


def gpt2_params(tensors: Mapping[str, ArrayLike]) -> Params:
    """Return the params of ``gpt2``, with ``scan`` and without dropout, from published tensors.

    Args:
        tensors: the tensors by their names in the published safetensors file, with or without
            ``transformer.`` before them. The masks and the copy of the table that some files hold
            are ignored.

    Raises:
        KeyError: for a tensor that is missing.
    """
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    layers = len({name.split(".")[1] for name in named if name.startswith("h.")})

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


def gpt2_tensors(params: Params) -> dict[str, Array]:
    """Return the tensors by their published names, the inverse of ``gpt2_params``.

    Args:
        params: the params of ``gpt2`` with ``scan`` and without dropout, or a gradient like them.
    """
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


def load_gpt2(path: str | PathLike[str], *, heads: int | None = None) -> tuple[Layer, Params]:
    """Return ``(net, params)`` from a safetensors file of a GPT-2; needs the extra ``[models]``.

    The sizes, all but ``heads``, are read off the tensors.

    Args:
        path: the file.
        heads: the number of attention heads; by default one for every 64 features, as in the
            published models.

    Raises:
        KeyError: for a tensor that is missing.
    """
    from safetensors.numpy import load_file

    params = gpt2_params(load_file(path))
    table, (positions, (attend, _), _) = params
    (vocab, features), length = np.shape(table), len(positions)
    layers = len(attend[0].scale)
    config = Gpt2Config(vocab, length, features, heads or features // 64, layers)
    return gpt2(config), params

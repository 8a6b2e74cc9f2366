"""GPT-2."""

from __future__ import annotations

from typing import NamedTuple

from jaxprop.combinators.chain import chain
from jaxprop.combinators.recompute import recompute
from jaxprop.combinators.repeat import repeat
from jaxprop.combinators.skip import skip
from jaxprop.combinators.tied import tied
from jaxprop.core.checks import check_count, check_flag, check_share, require
from jaxprop.core.layer import Layer
from jaxprop.layers import Attention, Dense, Dropout, Embedding, Gelu, LayerNorm, Positions
from jaxprop.layers.attention import Save


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


def gpt2(
    config: Gpt2Config,
    *,
    scan: bool = True,
    recomputing: bool = False,
    save: Save = "weights",
    kernels: bool | None = None,
) -> Layer:
    """Return GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners").

    It has learned positions, pre-norm blocks of causal attention and of a dense layer four times as
    wide, the tanh form of gelu, and a last LayerNorm. The embedding's own table gives the logits.

    Dropout takes effect if a key is given (``net.bind(params, key=key)``). Attention weights are
    not dropped.

    Args:
        config: the sizes.
        scan: whether the blocks are one ``repeat`` with stacked params, instead of separate layers.
        recomputing: whether a block saves only its input, and the walk back recomputes the rest
            (remat).
        save: what attention saves for backward, "weights" or "logsumexp".
        kernels: whether attention that saves "logsumexp" uses kernels, as for ``Attention``.

    Returns:
        A net from token ids (N, T), integers, to logits (N, T, vocab), with T at most
        ``config.length``.

    Raises:
        TypeError: for a config that is not a ``Gpt2Config``, and for an entry of the wrong type.
        ValueError: for an entry out of range, heads that do not divide the features, and another
            ``save``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.models.gpt2(jp.models.Gpt2Config(99, 16, 8, heads=2, layers=3))
        >>> ids = jnp.zeros((1, 5), int)
        >>> net.forward(net.init(jax.random.key(0), ids), ids)[0].shape
        (1, 5, 99)
    """
    require(config, Gpt2Config, "gpt2: config")
    for name in ("vocab", "length", "features", "heads", "layers"):
        check_count(f"gpt2: {name}", getattr(config, name))
    check_share("gpt2: dropout", config.dropout)
    check_flag("gpt2: scan", scan)
    check_flag("gpt2: recomputing", recomputing)
    d, heads = config.features, config.heads
    if d % heads:
        raise ValueError(f"gpt2: heads divides the {d} features, but is {heads}")
    attention = Attention(heads, save=save, kernels=kernels)
    drop = (Dropout(config.dropout),) if config.dropout else ()
    block = chain(
        skip(chain(LayerNorm(), Dense(3 * d), attention, Dense(d), *drop)),
        skip(chain(LayerNorm(), Dense(4 * d), Gelu(), Dense(d), *drop)),
    )
    block = recompute(block) if recomputing else block
    blocks = [repeat(block, config.layers)] if scan else [block] * config.layers
    body = chain(Positions(config.length), *drop, *blocks, LayerNorm())
    return tied(Embedding(config.vocab, d), body)

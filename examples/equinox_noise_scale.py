"""Train an Equinox transformer to write Python, and log the gradient's noise scale as it trains.

    python examples/equinox_noise_scale.py
    python examples/equinox_noise_scale.py --batch 32 --steps 2000

The noise scale is roughly the batch size beyond which a larger one helps little (McCandlish et al.
2018, https://arxiv.org/abs/1812.06162). Its two parts come with the gradient, from one walk back,
and are averaged over steps before they are divided. The model is an Equinox module, written for one
example. The text is that of gpt.py.
"""

import argparse
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from corpus import load, starts
from gpt import SYMBOLS, windows
from options import Parser, above_zero, natural, positive, run

import jaxprop as jp


class Block(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, d: int, heads: int, key: Any) -> None:
        for_attention, for_mlp = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(d), eqx.nn.LayerNorm(d)]
        self.attention = eqx.nn.MultiheadAttention(heads, d, key=for_attention)
        self.mlp = eqx.nn.MLP(d, d, 4 * d, depth=1, activation=jax.nn.gelu, key=for_mlp)

    def __call__(self, x: Any) -> Any:
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tri(len(x), dtype=bool))
        return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    positions: Any
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, args: argparse.Namespace, key: Any) -> None:
        d, (first, second, third, *keys) = args.features, jax.random.split(key, 3 + args.layers)
        self.embedding = eqx.nn.Embedding(SYMBOLS, d, key=first)
        self.positions = 0.02 * jax.random.normal(second, (args.length, d))
        self.blocks = [Block(d, args.heads, key) for key in keys]
        self.norm, self.head = eqx.nn.LayerNorm(d), eqx.nn.Linear(d, SYMBOLS, key=third)

    def __call__(self, tokens: Any) -> Any:
        x = jax.vmap(self.embedding)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


def train(args: argparse.Namespace) -> None:
    """Train the transformer, and print the loss and the noise scale of its last steps."""
    text, _ = load(args.seed)
    order = jnp.asarray(starts(args.seed, args.steps, args.batch, args.length, text))
    text, model = jnp.asarray(text), Transformer(args, jax.random.key(args.seed))
    params, static = eqx.partition(model, eqx.is_inexact_array)  # params, and all else
    net = jp.function(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
    asked = {"grads": jp.Gradient(), "noise": jp.NoiseScale(parts=True)}
    take = jp.quantities(net, jp.CrossEntropy(), **asked)
    optimizer, average = optax.adam(args.rate), jp.NoiseAverage(0.95)

    def step(carry: Any, starts: Any) -> tuple[Any, Any]:
        params, state, noise = carry
        found = take(params, *windows(text, starts, args.length))
        updates, state = optimizer.update(found["grads"], state, params)
        noise = average.update(noise, found["noise"])
        return (optax.apply_updates(params, updates), state, noise), found["value"]

    steps = jax.jit(lambda carry, order: jax.lax.scan(step, carry, order))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} params, {len(text):,} bytes to train on", flush=True)
    carry = params, optimizer.init(params), average.init()
    each = math.ceil(args.steps / args.reports)
    for done in range(0, args.steps, each):
        carry, values = steps(carry, order[done : done + each])
        print(
            f"step {done + len(values):6d}  train {values.mean() / math.log(2):.3f} bits per byte  "
            f"noise scale {average.value(carry[2]):6.1f} windows",
            flush=True,
        )


def main() -> None:
    parser = Parser("Train an Equinox transformer, and log the gradient's noise scale.")
    parser.add(
        ("steps", positive, 500, "training steps"),
        ("batch", positive, 16, "windows per step, at least 2"),
        ("length", positive, 64, "bytes per window"),
        ("layers", positive, 2, "number of blocks"),
        ("features", positive, 64, "width of the model"),
        ("heads", positive, 4, "attention heads"),
        ("rate", above_zero, 3e-3, "learning rate of Adam"),
        ("reports", positive, 10, "number of reports"),
        ("seed", natural, 0, "seed of the run"),
    )
    args = parser.parse()
    if args.features % args.heads:
        parser.error("--heads must divide --features")
    if args.batch < 2:
        parser.error("--batch: the noise scale is estimated from at least 2 windows")
    train(args)


if __name__ == "__main__":
    run(main)

"""Time attention, forward and backward, against jax.nn.dot_product_attention and cuDNN's.

    python examples/peers/attention.py [--quick]

Each row is one layer on packed q, k and v, with N examples, T positions and a number of heads of d
features. ``kernels`` is ``Attention(save="logsumexp")``, which on a GPU or a TPU is three kernels;
``scan`` is the same computed by XLA, block by block; ``weights`` saves the scores. ``xla`` and
``cudnn`` are the two implementations of jax.nn.dot_product_attention, by ``jax.vjp``; cudnn needs
an NVIDIA GPU and bfloat16 or float16. All results are first checked against each other. Times are
medians in milliseconds, taken in turn, each next to the program's temporary memory.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

import jaxprop as jp

SIZES = [  # N, T, heads, d, causal, dtype; the longest is too long to save its scores
    (8, 512, 12, 64, True, "float32"),
    (8, 512, 12, 64, True, "bfloat16"),
    (8, 1024, 16, 64, True, "bfloat16"),
    (4, 2048, 16, 64, False, "bfloat16"),
    (4, 4096, 16, 64, True, "bfloat16"),
    (4, 4096, 8, 128, True, "bfloat16"),
    (1, 16384, 8, 128, True, "bfloat16"),
]
QUICK = [(2, 64, 2, 16, True, "float32"), (2, 64, 2, 16, False, "bfloat16")]
LONGEST, ROUNDS, TIMES = 8192, 6, 3


def by_hand(layer, x, ct):
    """Return (y, d_x) by the layer's forward and backward."""
    y, residuals = layer.forward((), x)
    return y, layer.backward((), residuals, ct)[1]


def by_jax(implementation, heads, causal, x, ct):
    """Return (y, d_x) of jax.nn.dot_product_attention."""

    def attend(x):
        n, t, width = x.shape
        q, k, v = jnp.moveaxis(x.reshape(n, t, 3, heads, width // (3 * heads)), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)
        return y.reshape(n, t, width // 3)

    y, pull = jax.vjp(attend, x)
    return y, pull(ct)[0]


def functions(t, heads, causal, dtype):
    """Return the functions of a row, by name."""
    attention = functools.partial(jp.Attention, heads, causal)
    layers = {
        "kernels": attention(save="logsumexp"),
        "scan": attention(save="logsumexp", kernels=False),
        "weights": attention(),
    }
    found = {name: functools.partial(by_hand, layer) for name, layer in layers.items()}
    found["xla"] = functools.partial(by_jax, "xla", heads, causal)
    if jax.default_backend() == "gpu" and dtype != "float32":
        found["cudnn"] = functools.partial(by_jax, "cudnn", heads, causal)
    if t > LONGEST:
        del found["weights"], found["xla"]
    return {name: jax.jit(f) for name, f in found.items()}


def measured(fs, x, ct):
    """Return the median time in ms and the temporary memory in MB of each function."""
    programs = {name: f.lower(x, ct).compile() for name, f in fs.items()}
    ys = {name: jax.block_until_ready(program(x, ct)) for name, program in programs.items()}
    for name, y in ys.items():
        for ours, other in zip(ys["kernels"], y, strict=True):
            off = jnp.linalg.norm((ours - other).astype(jnp.float32).ravel())
            assert off < 2e-2 * jnp.linalg.norm(other.astype(jnp.float32).ravel()), name
    times = {name: [] for name in fs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(TIMES):
                y = program(x, ct)
            jax.block_until_ready(y)
            times[name].append((time.perf_counter() - start) / TIMES * 1e3)
    memory = {name: p.memory_analysis().temp_size_in_bytes / 1e6 for name, p in programs.items()}
    return {name: (statistics.median(times[name]), memory[name]) for name in fs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small rows")
    sizes = QUICK if parser.parse_args().quick else SIZES
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: ms (temp MB)")
    names = ("kernels", "scan", "weights", "xla", "cudnn")
    print(" ".join([f"{'N x T, heads x d':33s}", *(f"{name:>13s}" for name in names)]))
    for n, t, heads, d, causal, dtype in sizes:
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], (n, t, 3 * heads * d), dtype)
        ct = jax.random.normal(keys[1], (n, t, heads * d), dtype)
        costs = measured(functions(t, heads, causal, dtype), x, ct)
        row = f"{n} x {t}, {heads} x {d}, {dtype}{'' if causal else ', full'}"
        cells = [
            f"{costs[name][0]:7.2f} {f'({costs[name][1]:.0f})':>5s}" if name in costs else " " * 13
            for name in names
        ]
        print(" ".join([f"{row:33s}", *cells]).rstrip())


if __name__ == "__main__":
    main()

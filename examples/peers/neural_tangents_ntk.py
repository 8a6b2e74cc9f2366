"""Time tangent kernels by jaxprop, by neural-tangents, and by the Jacobian that autodiff forms.

    python examples/peers/neural_tangents_ntk.py
    python3 -m venv peers && peers/bin/pip install 'jax==0.4.20' 'jaxlib==0.4.20' 'numpy<2' \
        'scipy<1.13' neural-tangents==0.6.5 'tf2jax==0.3.5'
    peers/bin/python examples/peers/neural_tangents_ntk.py

neural-tangents 0.6.5, its last release, cannot be imported with any JAX that jaxprop runs on. So
the script times whichever of the two it finds against a method that both environments have: the
contraction of the Jacobian, by ``jax.jacrev`` of each example. ``vectors`` is the second published
method, NTK-vector products, written with ``jax.vjp`` and ``jax.jvp`` (Novak et al. 2022,
https://arxiv.org/abs/2206.08720). The functions are plain JAX; jaxprop builds them from its layers.

Each line has the median time, the median ratio to the Jacobian's time in the same round, the
temporary memory that XLA reports, and its ratio; the XLA of jax 0.4.20 reports none. A kernel with
other values ends the script.
"""

import importlib.util
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS, OUTPUTS, HEADS, FEATURES = 7, 10, 4, 64


def dense(params, x):
    for i, (w, b) in enumerate(params):
        x = (x if i == 0 else jax.nn.relu(x)) @ w + b
    return x


def convolution(params, x):
    *convolutions, (w, b) = params
    for kernel, bias in convolutions:
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        x = jax.nn.relu(x + bias)
    return x.mean((1, 2)) @ w + b


def transformer(params, x):
    def normed(params, x):
        centered = x - x.mean(-1, keepdims=True)
        var = (centered**2).mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(var + 1e-5) * params[0] + params[1]

    def attention(x):
        q, k, v = jnp.split(x.reshape(*x.shape[:2], 3 * HEADS, -1), 3, axis=2)
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
        y = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        return y.reshape(*x.shape[:2], -1)

    *blocks, norm, (w, b) = params
    for (norm1, (w1, b1), (w2, b2)), (norm2, (w3, b3), (w4, b4)) in blocks:
        x = x + attention(normed(norm1, x) @ w1 + b1) @ w2 + b2
        x = x + jax.nn.gelu(normed(norm2, x) @ w3 + b3) @ w4 + b4
    return normed(norm, x).mean(1) @ w + b


def sizes(*features):
    return [((i, o), (o,)) for i, o in itertools.pairwise(features)]


D = FEATURES
BLOCK = (
    (((D,), (D,)), *sizes(D, 3 * D), *sizes(D, D)),
    (((D,), (D,)), *sizes(D, 4 * D), *sizes(4 * D, D)),
)
KERNELS = [((3, 3, i, o), (o,)) for i, o in ((3, 16), (16, 32), (32, 32))]
PROBLEMS = {
    "784-512-512-10, N=64": (dense, sizes(784, 512, 512, OUTPUTS), (64, 784)),
    "3 convolutions, N=16": (convolution, KERNELS + sizes(32, OUTPUTS), (16, 16, 16, 3)),
    "2 blocks, T=32, N=16": (
        transformer,
        [BLOCK, BLOCK, ((D,), (D,)), *sizes(D, OUTPUTS)],
        (16, 32, D),
    ),
}


def layers(jp):
    """Return jaxprop's nets for the problems, in their order."""

    def block():
        attention = jp.chain(jp.Dense(3 * D), jp.Attention(HEADS, causal=False), jp.Dense(D))
        mlp = jp.chain(jp.Dense(4 * D), jp.Gelu(), jp.Dense(D))
        return jp.chain(*(jp.skip(jp.chain(jp.LayerNorm(), *f.layers)) for f in (attention, mlp)))

    convolutions = [
        layer for o in (16, 32, 32) for layer in (jp.Conv(o, (3, 3), padding="SAME"), jp.Relu())
    ]
    pooled = jp.GlobalAvgPool(), jp.Dense(OUTPUTS)
    return (
        jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(512), jp.Relu(), jp.Dense(OUTPUTS)),
        jp.chain(*convolutions, *pooled),
        jp.chain(block(), block(), jp.LayerNorm(), *pooled),
    )


def of_jacobian(f, full):
    def kernel(params, x):
        each = jax.vmap(jax.jacrev(lambda p, x: f(p, x[None])[0]), (None, 0))(params, x)
        rows = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree_util.tree_leaves(each)]
        if full:
            return sum(jnp.einsum("ncp,mdp->nmcd", j, j) for j in rows)
        return sum(jnp.einsum("ncp,mcp->nm", j, j) for j in rows) / OUTPUTS

    return kernel


def of_vectors(f, full):
    def of_pair(params, a, b):
        _, pull = jax.vjp(lambda p: f(p, a[None])[0], params)
        push = lambda v: jax.jvp(lambda p: f(p, b[None])[0], (params,), pull(v))[1]  # noqa: E731
        columns = jax.vmap(push)(jnp.eye(OUTPUTS))
        return columns if full else jnp.trace(columns) / OUTPUTS

    return lambda params, x: jax.vmap(
        lambda a: jax.vmap(lambda b: of_pair(params, a, b))(x),
    )(x)


def methods(index, f, full):
    """Return the kernels available in this environment, functions of params and x."""
    found = {"Jacobian": of_jacobian(f, full), "vectors": of_vectors(f, full)}
    if importlib.util.find_spec("neural_tangents"):
        import neural_tangents as nt

        for number, name in enumerate(("Jacobian", "vectors", "structured"), start=1):
            kernel = nt.empirical_ntk_fn(
                f, trace_axes=() if full else (-1,), vmap_axes=0, implementation=number
            )
            found[f"nt: {name}"] = lambda params, x, kernel=kernel: kernel(x, None, params)
    if importlib.util.find_spec("jaxprop"):
        import jaxprop as jp

        net = layers(jp)[index]

        def by_jaxprop(params, x):
            leaves, structure = (
                jax.tree.leaves(params),
                jax.tree.structure(jax.eval_shape(net.init, jax.random.key(0), x)),
            )
            return jp.ntk(net, full=full)(jax.tree.unflatten(structure, leaves), x)

        found["jp.ntk"] = by_jaxprop
    return found


def timed(step, *args):
    start = time.perf_counter()
    jax.block_until_ready(step(*args))
    return time.perf_counter() - start


def main():
    print(f"jax {jax.__version__}, {jax.default_backend()}; times and memory of the Jacobian = 1")
    print(f"{'':22}{'':6}{'':16}{'ms':>9}{'ratio':>8}{'MB':>9}{'ratio':>8}")
    for index, (problem, (f, shapes, shape)) in enumerate(PROBLEMS.items()):
        rng = np.random.default_rng(0)

        def drawn(shape, rng=rng):
            fan = np.prod(shape[:-1]) if len(shape) > 1 else 1
            return jnp.asarray(rng.normal(size=shape) / fan**0.5, jnp.float32)

        is_shape = lambda node: isinstance(node, tuple) and isinstance(node[0], int)  # noqa: E731
        params = jax.tree_util.tree_map(drawn, shapes, is_leaf=is_shape)
        x = drawn(shape) * np.prod(shape[:-1]) ** 0.5
        for full in (False, True):
            compiled = {
                name: jax.jit(kernel).lower(params, x).compile()
                for name, kernel in methods(index, f, full).items()
            }
            want = compiled["Jacobian"](params, x)
            for name, step in compiled.items():
                error = jnp.max(abs(step(params, x) - want)) / jnp.max(abs(want))
                if not error < 1e-4:
                    raise SystemExit(f"{problem}, {name}: off by {error:.1e}")
            rounds = [
                {name: timed(step, params, x) for name, step in compiled.items()}
                for _ in range(ROUNDS)
            ]
            memory = {k: c.memory_analysis().temp_size_in_bytes for k, c in compiled.items()}
            for name in compiled:
                ms = 1e3 * statistics.median(times[name] for times in rounds)
                ratio = statistics.median(times[name] / times["Jacobian"] for times in rounds)
                size = memory[name] / 1e6
                part = memory[name] / (memory["Jacobian"] or float("nan"))  # old XLA reports none
                kind = "full" if full else "trace"
                print(
                    f"{problem:22}{kind:6}{name:16}{ms:9.1f}{ratio:8.3f}{size:9.1f}{part:8.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

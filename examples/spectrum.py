"""Take a Newton step in a small GPT, and draw the spectrum of its Hessian.

    python examples/spectrum.py --plot spectrum.png
    python examples/spectrum.py --train 2000 --probes 10

``jp.hvp`` and ``jp.ggn_vp`` return the product of a vector with the Hessian of the loss, and with
its Gauss-Newton part; neither matrix is stored. Newton's step solves a ``lineax`` operator of such
products by conjugate gradients. The density of eigenvalues is that of stochastic Lanczos quadrature
(Ghorbani et al. 2019, https://arxiv.org/abs/1901.10159). Lanczos takes eight lines if the whole
basis is kept, which is small enough here; ``matfree`` has other ways.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
from corpus import load, starts
from gpt import LOSS, make_net, windows
from jax.flatten_util import ravel_pytree
from options import Parser, above_zero, natural, picture, positive, run
from scanning import make_steps

import jaxprop as jp

Product = Callable[[Any], Any]


def newton(product: Product, grads: Any, damping: Any, steps: int) -> tuple[Any, Any]:
    """Return the solution of (H + damping) step = grads by CG, and the number of products."""
    like, definite = jax.eval_shape(lambda: grads), lineax.positive_semidefinite_tag
    hessian = lineax.FunctionLinearOperator(product, like)
    damped = hessian + damping * lineax.IdentityLinearOperator(like)
    operator = lineax.TaggedLinearOperator(damped, definite)
    solver = lineax.CG(rtol=1e-3, atol=0.0, max_steps=steps)
    solution = lineax.linear_solve(operator, grads, solver, throw=False)
    return solution.value, solution.stats["num_steps"]


def lanczos(product: Product, v: Any, steps: int) -> tuple[Any, Any]:
    """Return Ritz values, ascending, and the weight that v, of length 1, has in each.

    They are the nodes and weights of Gauss's quadrature for v^T f(A) v. Each new vector is made
    orthogonal to all earlier ones, twice; otherwise large eigenvalues would appear again.
    """

    def step(carry: Any, i: Any) -> tuple[Any, Any]:
        basis, v = carry
        basis, w = basis.at[i].set(v), product(v)
        alpha = v @ w
        for _ in range(2):
            w -= basis.T @ (basis @ w)
        beta = jnp.linalg.norm(w)
        return (basis, w / beta), (alpha, beta)

    empty = jnp.zeros((steps, v.size), v.dtype)
    _, (alphas, betas) = jax.lax.scan(step, (empty, v), jnp.arange(steps))
    off = jnp.diag(betas[:-1], 1)
    values, vectors = jnp.linalg.eigh(jnp.diag(alphas) + off + off.T)
    return values, vectors[0] ** 2


def spectrum(product: Product, params: Any, key: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the Ritz values and weights of some random vectors, (probes, steps) each."""
    flat, unravel = ravel_pytree(params)

    def of_probe(key: Any) -> tuple[Any, Any]:
        v = jax.random.normal(key, flat.shape)
        of_flat = lambda v: ravel_pytree(product(unravel(v)))[0]  # noqa: E731
        return lanczos(of_flat, v / jnp.linalg.norm(v), args.lanczos)

    return jax.lax.map(of_probe, jax.random.split(key, args.probes))


def train(args: argparse.Namespace, net: Any, text: Any) -> Any:
    """Return the params after ``args.train`` steps of Adam."""
    order = jnp.asarray(starts(args.seed, args.train, args.batch, args.length, text))
    text = jnp.asarray(text)
    update = jp.make_update(net, LOSS, optax.adam(args.rate), max_norm=1.0)
    steps = make_steps(update, lambda starts: windows(text, starts, args.length))
    params = net.init(jax.random.key(args.seed), windows(text, order[0], args.length)[0])
    return steps(params, update.init(params), order)[0]


def analyze(args: argparse.Namespace) -> None:
    """Train the GPT, print its spectrum and the effect of a Newton step, and draw the spectrum."""
    net, texts = make_net(args), load(args.seed)
    params = train(args, net, texts[0])
    batch, held_out = (
        windows(jnp.asarray(text), jnp.asarray(at[0]), args.length)
        for text in texts
        for at in [starts(args.seed + 1, 1, args.batch, args.length, text)]
    )
    loss, key = jax.jit(jp.value_and_grad(net, LOSS)), jax.random.key(args.seed)

    @jax.jit
    def of_hessian(params: Any, grads: Any) -> tuple[Any, ...]:
        product = jp.hvp(net, LOSS)(params, *batch)
        values, weights = spectrum(product, params, key, args)
        damping = args.damping - jnp.minimum(values.min(), 0)
        step, products = newton(product, grads, damping, args.cg)
        return (values, weights), jax.tree.map(jnp.subtract, params, step), products, damping

    @jax.jit
    def of_gauss_newton(params: Any) -> tuple[Any, Any]:
        return spectrum(jp.ggn_vp(net, LOSS)(params, *batch), params, key, args)

    def descent(params: Any, steps: Any, rate: Any) -> Any:
        for _ in range(steps):
            params = jax.tree.map(lambda p, g: p - rate * g, params, loss(params, *batch)[1])
        return params

    hessian, after, products, damping = of_hessian(params, loss(params, *batch)[1])
    spectra = {"Hessian": hessian, "Gauss-Newton": of_gauss_newton(params)}
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} params, the spectrum on {args.batch} windows of {args.length} bytes\n")
    print(f"{'':24}" + "".join(f"{name:>14}" for name in spectra))
    for i in range(min(5, args.lanczos)):
        row = "".join(f"{values[0, -1 - i]:14.3f}" for values, _ in spectra.values())
        print(f"eigenvalue {i + 1:<13}{row}")
    print(f"{'the least':24}" + "".join(f"{values[0, 0]:14.3f}" for values, _ in spectra.values()))
    shares = [jnp.sum(w * abs(v) * (v < 0)) / jnp.sum(w * abs(v)) for v, w in spectra.values()]
    print(f"{'negative part of sum |λ|':24}" + "".join(f"{share:14.1%}" for share in shares))

    rate, gradients = 1 / hessian[0].max(), 1 + 2 * int(products)  # a product costs at most two
    print(f"\n{'loss in nats a byte':50}{'batch':>10}{'held out':>10}")
    for name, at in (
        ("before", params),
        (f"a Newton step, {products} products, damping {damping:.2f}", after),
        (f"a gradient step, rate {rate:.3f}", descent(params, 1, rate)),
        (f"{gradients} of them, the cost of Newton's", descent(params, gradients, rate)),
    ):
        values = [loss(at, *data)[0] for data in (batch, held_out)]
        print(f"{name:50}" + "".join(f"{value:10.4f}" for value in values))
    if args.plot is not None:
        draw(spectra, args.plot)


def draw(spectra: dict[str, Any], path: Any) -> None:
    """Draw the density of eigenvalues, each Ritz value as a narrow Gaussian of its weight."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    low, high = (end([end(v) for v, _ in spectra.values()]) for end in (np.min, np.max))
    width, room = 0.003 * (high - low), 0.03 * (high - low)
    grid = np.linspace(low - room, high + room, 4000)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name, (values, weights) in spectra.items():
        bumps = np.exp(-(((grid[:, None] - np.ravel(values)) / width) ** 2) / 2)
        density = bumps @ np.ravel(weights) / (len(values) * width * np.sqrt(2 * np.pi))
        axes.semilogy(grid, density, label=name)
    axes.set(xlabel="eigenvalue", ylabel="density", ylim=(1e-7, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"the spectrum in {path}")


def main() -> None:
    parser = Parser("The spectrum of a small GPT's Hessian, and a Newton step.")
    parser.add(
        ("train", positive, 300, "steps of Adam before"),
        ("batch", positive, 32, "windows per step, and for the Hessian"),
        ("length", positive, 32, "bytes per window"),
        ("layers", positive, 2, "number of blocks"),
        ("features", positive, 32, "width of the model"),
        ("heads", positive, 2, "attention heads"),
        ("rate", above_zero, 3e-3, "learning rate of Adam"),
        ("lanczos", positive, 50, "Lanczos steps for each random vector"),
        ("probes", positive, 2, "random vectors for the density"),
        ("cg", positive, 30, "the most products for the Newton step"),
        ("damping", above_zero, 0.3, "of the Newton step, above what makes H definite"),
        ("seed", natural, 0, "seed of the run"),
        ("plot", picture, None, "draw the spectrum into this file"),
    )
    parser.set_defaults(dtype="float32", recompute=False)
    args = parser.parse()
    if args.features % args.heads:
        parser.error("--heads must divide --features")
    analyze(args)


if __name__ == "__main__":
    run(main)

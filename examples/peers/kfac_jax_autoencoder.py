"""Compare jaxprop's K-FAC with kfac-jax: Kronecker factors, and steps on an autoencoder.

    python3 -m venv peers && peers/bin/pip install . 'jax==0.9.1' 'jaxlib==0.9.1' kfac-jax==0.0.8 \
        scikit-learn
    OPENBLAS_NUM_THREADS=1 peers/bin/python examples/peers/kfac_jax_autoencoder.py

kfac-jax 0.0.8, its last release, evaluates a jaxpr by ``get_bind_params``, which returns one dict
since jax 0.9.2: there, and in jax 0.10, its optimizer fails with "too many values to unpack". With
jax 0.9.1, both libraries run in one process.

First, the script compares the factors of one batch, for two nets on digits. It uses the estimators
that draw nothing: the exact Gauss-Newton matrix and the empirical Fisher matrix. Both libraries
have biases in homogeneous coordinates. Their factors differ by two constants, which the script
multiplies in. For the empirical matrix, kfac-jax divides by the number of examples once more, since
its g_n are shares of the gradient of the mean; ours are gradients of each example's own loss. For a
convolution, it divides b by the number of positions T, and returns T as a scale of the block; our b
is a sum.

Then both train the digits' autoencoder of examples/kfac.py, from the same params, in steps of the
whole batch. kfac-jax takes the loss as a sum over pixels, so that its weight is one over their
number. Both find their own learning rate, momentum and damping. All else is left at its default,
except that the burn-in of kfac-jax's factors, ten updates before the first step, is turned off. Its
defaults differ from ours in three ways. Its factors come from random signs, ours from sampled
targets. It splits the damping between the two factors, while ours is added to the eigenvalues. And
its damping shrinks by 0.9 a step, ours by 0.95, as in the K-FAC paper; with 0.95 there too, which
has its own line, kfac-jax takes about as many steps as jaxprop. Rounds of ten steps alternate; the
time is that of the median round. On a few shared cores, the eigenvectors of a matrix of 128 rows
may take a hundred times as long with several threads of OpenBLAS as with one, hence the setting.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

import jaxprop as jp

sys.path.insert(0, str(Path(__file__).parents[1]))

import kfac
from digits import load

STEPS, ROUND, THRESHOLD = 200, 10, 0.23
DAMPINGS, PERIODS = (1e-2, 1e-3), (10, 5)
NETS = {
    "dense": jp.chain(jp.Flatten(), jp.Dense(32), jp.Tanh(), jp.Dense(10)),
    "convolution": jp.chain(
        jp.Conv(4, (3, 3), padding="SAME"),
        jp.Tanh(),
        jp.Conv(6, (3, 3), strides=(2, 2), padding="SAME"),
        jp.Tanh(),
        jp.Flatten(),
        jp.Dense(10),
    ),
}


def affine(params):
    """Return (w, b) of each layer that has them: kfac-jax takes no empty entries."""
    return [(layer.w, layer.b) for layer in params if layer != ()]


def classified(params, batch):
    """Return the mean cross-entropy of either net in NETS, in plain JAX, registered."""
    x, target = batch
    for i, (w, b) in enumerate(params):
        x = jnp.tanh(x) if i else x
        if w.ndim == 4:
            layout, strides = ("NHWC", "HWIO", "NHWC"), (1 + i, 1 + i)
            y = jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=layout)
            x = y + b
        else:
            x = x.reshape(len(x), -1) @ w + b
    kfac_jax.register_softmax_cross_entropy_loss(x, target)
    return -jnp.mean(jax.nn.log_softmax(x)[jnp.arange(len(x)), target])


def reconstructed(params, x):
    """Return the mean loss of the autoencoder in plain JAX, registered."""
    code, y = len(params) // 2 - 1, x
    for i, (w, b) in enumerate(params):
        y = y @ w + b
        if i not in (code, len(params) - 1):
            y = jnp.tanh(y)
    kfac_jax.register_sigmoid_cross_entropy_loss(y, x, weight=1 / y.shape[-1])
    return jnp.mean(jax.nn.softplus(y) - x * y)


def factors_of_kfac_jax(mode, params, batch):
    """Return (a, b, T) of each layer, after one update of an empty average."""
    estimator = kfac_jax.BlockDiagonalCurvature(classified, default_estimation_mode=mode)
    key, args = jax.random.key(0), (params, batch)
    state = estimator.init(key, args, exact_powers_to_cache=None, approx_powers_to_cache=None)
    state = estimator.update_curvature_matrix_estimate(
        state,
        ema_old=0.0,
        ema_new=1.0,
        identity_weight=0.0,
        batch_size=len(batch[1]),
        rng=key,
        func_args=args,
    )
    found = []
    for _, index in estimator.params_block_index:
        block, its_state = estimator.blocks[index], state.blocks_states[index]
        found.append((*(factor.value for factor in its_state.factors), block.fixed_scale()))
    return found


def hold_factors(images, labels):
    """Print the relative errors between both libraries' factors, and stop if they differ."""
    print(f"{'factors':13} {'':22} relative error of a and of b, by layer")
    for name, net in NETS.items():
        params = net.init(jax.random.key(1), images[:1])
        x = images.reshape(len(images), -1) if name == "dense" else images
        for mode in ("ggn_exact", "fisher_empirical"):
            empirical = mode == "fisher_empirical"
            asked = jp.quantity.KroneckerFactors(empirical=empirical, joint_bias=True)
            of_batch = jax.jit(jp.quantities(net, jp.CrossEntropy(), it=asked))
            ours = [layer.w for layer in of_batch(params, images, labels)["it"] if layer != ()]
            errors = []
            for (a, b, positions), factors in zip(
                factors_of_kfac_jax(mode, affine(params), (x, labels)), ours, strict=True
            ):
                b = b * positions * (len(labels) if empirical else 1)
                errors += [
                    float(jnp.linalg.norm(hers - it) / jnp.linalg.norm(it))
                    for hers, it in ((a, factors.a), (b, factors.b))
                ]
            print(f"{name:13} {mode:22}", *(f"{error:.0e}" for error in errors), flush=True)
            if not max(errors) < 1e-4:
                raise SystemExit("the factors are not the same")


def by_kfac_jax(params, x, damping, period, decay=0.9):
    """Return a function that takes a step and returns the loss before it.

    Args:
        params: the params to start from.
        x: the digits.
        damping: the damping to start from.
        period: the number of steps from one inversion of the factors to the next.
        decay: the factor per step by which the damping shrinks.
    """
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(reconstructed),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        damping_adaptation_decay=decay,
        inverse_update_period=period,
        num_burnin_steps=0,
    )
    params = jax.tree.map(jnp.copy, affine(params))
    state = optimizer.init(params, jax.random.key(1), x)

    def step(i):
        nonlocal params, state
        key = jax.random.fold_in(jax.random.key(2), i)
        params, state, found = optimizer.step(params, state, key, batch=x, global_step_int=i)
        return found["loss"]

    return step


def by_jaxprop(params, x, damping, period):
    """Return the same function for jaxprop."""
    net, like = kfac.autoencoder(), (params, x, x)
    optimizer = jp.kfac(net, kfac.LOSS, like, damping=damping, inverse_every=period)
    update = jp.make_update(net, kfac.LOSS, optimizer)
    params = jax.tree.map(jnp.copy, params)
    state = update.init(params)

    def step(i):
        nonlocal params, state
        params, state, value = update(params, state, x, x)
        return value

    return step


def main():
    print(f"jax {jax.__version__}, kfac-jax {kfac_jax.__version__}, {jax.default_backend()}")
    x, labels, *_ = load(0)
    hold_factors(x[:128].reshape(-1, 8, 8, 1), labels[:128])

    params = kfac.autoencoder().init(jax.random.key(0), x[:1])
    first = float(reconstructed(affine(params), x))
    ours = float(jp.loss_fn(kfac.autoencoder(), kfac.LOSS)(params, x, x))
    print(f"\nloss of {len(x)} digits before the first step: {first:.6f}, ours {ours:.6f}")
    if not abs(first - ours) < 1e-5:
        raise SystemExit("the losses are not the same")
    print(f"steps until it stays below {THRESHOLD}, of {STEPS}; ms a step, s to there")
    print(
        f"{'inverses every':>14} {'damping':>8} {'':14} {'steps':>6} {'ms':>7} {'s':>6} {'end':>7}"
    )
    for period in PERIODS:
        for damping in DAMPINGS:
            makers = {
                "kfac-jax": by_kfac_jax,
                "kfac-jax, 0.95": functools.partial(by_kfac_jax, decay=0.95),
                "jp.kfac": by_jaxprop,
            }
            steps = {name: make(params, x, damping, period) for name, make in makers.items()}
            values, times = ({name: [] for name in steps} for _ in range(2))
            for start in range(0, STEPS, ROUND):
                for name, step in steps.items():
                    began = time.perf_counter()
                    found = [step(i) for i in range(start, start + ROUND)]
                    jax.block_until_ready(found[-1])
                    times[name].append((time.perf_counter() - began) / ROUND)
                    values[name] += map(float, found)
            for name in steps:
                number = kfac.steps_to(np.asarray(values[name]), THRESHOLD)
                seconds = statistics.median(times[name])
                whole = "never" if number is None else f"{number * seconds:.1f}"
                print(
                    f"{period:14} {damping:8g} {name:14} {number or 'never':>6} "
                    f"{1e3 * seconds:7.1f} {whole:>6} {values[name][-1]:7.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

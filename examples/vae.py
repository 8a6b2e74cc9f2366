"""Train a variational autoencoder on digits: a net with two outputs, and a loss on each.

python examples/vae.py --epochs 30    # Kingma and Welling 2014, https://arxiv.org/abs/1312.6114
"""

import jax
import jax.numpy as jnp
import optax
from options import Parser, positive, run
from sklearn.datasets import load_digits

import jaxprop as jp


class Sample(jp.Layer):
    """A sample z = mean + exp(logvar / 2) e, e normal; without a key e is 0. y holds z and x."""

    takes = jp.Key

    def forward(self, params, x):
        scale, draws = jnp.exp(x["logvar"] / 2), isinstance(params, jp.Key)
        moved = scale * jax.random.normal(params.value, scale.shape) if draws else 0 * scale
        return {"image": x["mean"] + moved, "latent": x}, moved

    def backward(self, params, moved, ct):
        d_z, d_latent = ct["image"], ct["latent"]
        return (), {"mean": d_z + d_latent["mean"], "logvar": d_z * moved / 2 + d_latent["logvar"]}


def divergence(latent):
    """Return KL(N(mean, diag exp(logvar)) || N(0, I)) of one example."""
    return jnp.sum(latent["mean"] ** 2 + jnp.exp(latent["logvar"]) - 1 - latent["logvar"]) / 2


ENCODER = jp.chain(jp.Dense(128), jp.Silu(), jp.branch(mean=jp.Dense(8), logvar=jp.Dense(8)))
DECODER = jp.chain(jp.Dense(128), jp.Silu(), jp.Dense(64))
NET = jp.chain(ENCODER, Sample(), jp.on("image", DECODER))
LOSS = jp.total_loss(image=(64, jp.BinaryCrossEntropy()), latent=jp.loss(divergence))


def main():
    parser = Parser("Train a variational autoencoder on digits.")
    parser.add(("epochs", positive, 30, "passes over the images"))
    images = jnp.asarray(load_digits(return_X_y=True)[0] / 16, jnp.float32)[:1792]
    params, key = NET.init(jax.random.key(0), images[:1]), jax.random.key(1)
    update = jp.make_update(NET, LOSS, optax.adam(2e-3))
    state = update.init(params)
    for epoch in range(parser.parse().epochs):
        values, batches = [], jax.random.permutation(jax.random.fold_in(key, epoch), images)
        for x in batches.reshape(28, 64, 64):
            key, own = jax.random.split(key)
            params, state, value = update(params, state, x, {"image": x}, own)
            values.append(value)
        print(f"epoch {epoch + 1:2}  -ELBO {jnp.stack(values).mean():.3f} nats an image")
    norms = jax.jit(jp.per_example_sq_norms(NET, LOSS))(params, images, {"image": images}, key=key)
    print(f"the largest gradient is that of image {norms.argmax()}: {jnp.sqrt(norms.max()):.1f}")


if __name__ == "__main__":
    run(main)

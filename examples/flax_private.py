"""Train a Flax network on handwritten digits by DP-SGD, without a change to the network.

    python examples/flax_private.py
    python examples/flax_private.py --noise 2 --epochs 20

The network is plain Flax. ``jp.function`` makes a net of it, which private_sgd.py trains like its
own: Poisson samples, padded to one size with images of weight zero, each image's gradient clipped
in one walk back, and epsilon from dp-accounting. The table printed first says which params have
factored gradients, and where in this file these params meet the images.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from options import Parser, run
from private_sgd import OPTIONS, train

import jaxprop as jp


class Cnn(nn.Module):
    """Two convolutions and a dense layer, on rows of 64 pixels."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(16, (3, 3))(x.reshape(-1, 8, 8, 1)))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def main() -> None:
    parser = Parser("Train a Flax network on scikit-learn's digits privately.")
    parser.add(*OPTIONS)
    args = parser.parse()
    model = Cnn()
    net = jp.function(model.apply, model.init)
    images = jax.ShapeDtypeStruct((args.batch, 64), jnp.float32)
    print(net.coverage(jax.eval_shape(model.init, jax.random.key(0), images), images), flush=True)
    train(net, args)


if __name__ == "__main__":
    run(main)

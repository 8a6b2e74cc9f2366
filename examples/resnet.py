"""Train a pre-activation ResNet with GroupNorm on 32 x 32 images, and estimate its noise scale.

    python examples/resnet.py
    python examples/resnet.py --blocks 3 --features 16
    python examples/resnet.py --grad auto

A stage is one ``repeat`` of identical blocks x + f(x), in which norm and relu precede each
convolution (He et al. 2016, https://arxiv.org/abs/1603.05027). Between stages a ``branch`` halves
the image size and doubles the channels. With GroupNorm, unlike BatchNorm, each example has its own
gradient, so the noise scale is defined. It is roughly the batch size beyond which a larger one
helps little (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162). The script prints an
estimate of it after each epoch, from one walk over some of the images.
"""

from typing import Any

import jax
from images import LOSS, Observe, make_parser, parse, train
from options import positive, run

import jaxprop as jp

GROUPS = 4


def conv_block(features: int, strides: int = 1) -> jp.Layer:
    """Return two convolutions, each after a norm and a relu."""
    return jp.chain(
        *(jp.GroupNorm(GROUPS), jp.Relu(), jp.Conv(features, strides=strides)),
        *(jp.GroupNorm(GROUPS), jp.Relu(), jp.Conv(features)),
    )


def make_net(features: int, blocks: int, stages: int, classes: int = 10) -> jp.Layer:
    """Return the ResNet.

    Args:
        features: the channels of the first stage.
        blocks: the number of identical blocks in each stage.
        stages: the number of stages.
        classes: the number of classes.
    """
    layers: list[jp.Layer] = [jp.Conv(features, strides=2)]
    for stage in range(stages):
        width = features * 2**stage
        if stage:
            projection = jp.Conv(width, (1, 1), strides=2, bias=False)
            layers.append(jp.branch(projection, conv_block(width, strides=2)))
        layers.append(jp.repeat(jp.skip(conv_block(width)), blocks))
    head = jp.GroupNorm(GROUPS), jp.Relu(), jp.GlobalAvgPool(), jp.Dense(classes)
    return jp.chain(*layers, *head)


def noise_scale(net: jp.Layer, examples: int = 512) -> Observe:
    """Return a function that reports the noise scale on the first ``examples`` images."""
    scale = jax.jit(jp.noise_scale(net, LOSS))

    def observe(params: Any, x: Any, target: Any) -> str:
        x, target = x[:examples], target[:examples]
        estimate = float(scale(params, x, target))
        # If noise dominates the mean gradient, the estimate of its square may be negative.
        return f"noise scale {estimate:.0f}" if estimate > 0 else f"noise scale above {len(x)}"

    return observe


def main() -> None:
    parser = make_parser("Train a small ResNet on digits.")
    parser.set_defaults(epochs=10, batch=32, rate=1e-2)
    parser.add(
        ("features", positive, 8, "channels of the first stage"),
        ("stages", positive, 3, "number of stages"),
        ("blocks", positive, 1, "identical blocks in each stage"),
    )
    args = parse(parser)
    if args.features % GROUPS:
        parser.error(f"--features is a multiple of {GROUPS}")
    net = make_net(args.features, args.blocks, args.stages)
    train(net, args, noise_scale(net))


if __name__ == "__main__":
    run(main)

"""A pre-activation ResNet with GroupNorm on images of 32 x 32: how large should its batch be?

    python examples/resnet.py
    python examples/resnet.py --blocks 3 --features 16
    python examples/resnet.py --grad auto

A stage is one ``repeat`` of equal blocks, each x + f(x) with the norms and relus ahead of the
convolutions (He et al. 2016, https://arxiv.org/abs/1603.05027); between stages a ``branch`` halves
the image and doubles the channels. GroupNorm, unlike BatchNorm, leaves every example a gradient of
its own, and so there is a noise scale: about the batch size from which a larger one helps little.
After each epoch it is printed, from one walk over some of the images.
"""

from typing import Any

import jax
from images import LOSS, Observe, make_parser, parse, train

import jaxprop as jp

GROUPS = 4


def residual(features: int, strides: int = 1) -> jp.Layer:
    return jp.chain(
        *(jp.GroupNorm(GROUPS), jp.Relu(), jp.Conv(features, strides=strides)),
        *(jp.GroupNorm(GROUPS), jp.Relu(), jp.Conv(features)),
    )


def make_net(features: int, blocks: int, stages: int, classes: int = 10) -> jp.Layer:
    layers: list[jp.Layer] = [jp.Conv(features, strides=2)]
    for stage in range(stages):
        width = features * 2**stage
        if stage:
            projection = jp.Conv(width, (1, 1), strides=2, bias=False)
            layers.append(jp.branch(projection, residual(width, strides=2)))
        layers.append(jp.repeat(jp.skip(residual(width)), blocks))
    head = jp.GroupNorm(GROUPS), jp.Relu(), jp.GlobalAvgPool(), jp.Dense(classes)
    return jp.chain(*layers, *head)


def noise_scale(net: jp.Layer, examples: int = 512) -> Observe:
    scale = jax.jit(jp.noise_scale(net, LOSS))

    def observe(params: Any, x: Any, target: Any) -> str:
        x, target = x[:examples], target[:examples]
        estimate = float(scale(params, x, target))
        # Where the mean gradient drowns in the noise, the estimate of its square is negative.
        return f"noise scale {estimate:.0f}" if estimate > 0 else f"noise scale above {len(x)}"

    return observe


def main() -> None:
    parser = make_parser("Train a small ResNet on digits.")
    parser.set_defaults(epochs=10, batch=32, rate=1e-2)
    parser.add_argument("--features", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=1, help="equal blocks in each stage")
    args = parse(parser)
    if args.features < GROUPS or args.features % GROUPS:
        parser.error(f"--features is a multiple of {GROUPS}")
    if min(args.stages, args.blocks) < 1:
        parser.error("--stages and --blocks are at least 1")
    net = make_net(args.features, args.blocks, args.stages)
    train(net, args, noise_scale(net))


if __name__ == "__main__":
    main()

"""Time BackPACK on the quantities and the network of `jaxprop bench`.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 backpack-for-pytorch
    peers/bin/python examples/peers/backpack_quantities.py

Runs of a quantity alternate with runs of the plain gradient. The script prints the medians of both
times and of their ratio.
"""

import statistics
import time

import torch
from backpack import backpack, extend
from backpack.extensions import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    SumGradSquared,
    Variance,
)
from torch import nn

BATCH, PAIRS = 128, 9


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    x, target = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
    plain, plain_loss = network(), nn.CrossEntropyLoss()
    net, loss = extend(network()), extend(nn.CrossEntropyLoss())

    def gradient():
        plain.zero_grad()
        plain_loss(plain(x), target).backward()

    def quantity(extension):
        def step():
            net.zero_grad()
            with backpack(extension):
                loss(net(x), target).backward()

        return step

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':16} {'ms':>8} {'gradient ms':>12} {'ratio':>6}")
    for name, extension in (
        ("sq-norms", BatchL2Grad()),
        ("second-moment", SumGradSquared()),
        ("variance", Variance()),
        ("diag-ggn-mc", DiagGGNMC()),
        ("diag-ggn", DiagGGNExact()),
        ("kfac", KFAC()),
        ("kflr", KFLR()),
        ("grads", BatchGrad()),
    ):
        step = quantity(extension)
        step(), gradient()
        pairs = [(timed(step), timed(gradient)) for _ in range(PAIRS)]
        a, b = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name:16} {a:8.2f} {b:12.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Time Opacus's ghost clipping on the network of the `clipped` row of `jaxprop bench`.

    python3 -m venv peers && peers/bin/pip install opacus
    peers/bin/python examples/peers/opacus_clipping.py

A clipped step without noise alternates with a plain step of SGD on the same network. The script
prints the medians of both times and of their ratio.
"""

import statistics
import time
import warnings

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
BATCH, PAIRS = 32, 9


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5120, 2560), nn.ReLU(), nn.Linear(2560, 1280))


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    x, target = torch.randn(BATCH, 5120), torch.randint(0, 1280, (BATCH,))
    plain, plain_loss = network(), nn.CrossEntropyLoss()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)

    net = network()
    net, optimizer, loss, _ = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, target), batch_size=BATCH),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
        poisson_sampling=False,
    )

    def sgd():
        plain_optimizer.zero_grad()
        plain_loss(plain(x), target).backward()
        plain_optimizer.step()

    def private():
        optimizer.zero_grad()
        loss(net(x), target).backward()
        optimizer.step()

    private(), sgd()
    pairs = [(timed(private), timed(sgd)) for _ in range(PAIRS)]
    a, b = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"ghost-clipped step {a:.1f} ms, SGD step {b:.1f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()

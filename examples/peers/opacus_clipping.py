"""Time Opacus's ghost clipping on networks of `jaxprop bench`.

    python3 -m venv peers && peers/bin/pip install opacus
    peers/bin/python examples/peers/opacus_clipping.py wide|mlp|cnn

wide is the network of the row `clipped`, mlp and cnn are those of the rows `linen-`. A clipped step
without noise alternates with a plain step of SGD on the same network. The script prints the medians
of both times and of their ratio.
"""

import statistics
import sys
import time
import warnings

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
PAIRS = 9
SHAPES = {"wide": (32, 5120), "mlp": (128, 784), "cnn": (64, 3, 28, 28)}


def network(name):
    torch.manual_seed(0)
    if name == "wide":
        return nn.Sequential(nn.Linear(5120, 2560), nn.ReLU(), nn.Linear(2560, 1280))
    layers, channels = [], 3
    if name == "cnn":
        for features in (64, 96, 128):
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = features
        layers += [nn.Flatten(), nn.Linear(9 * channels, 256), nn.ReLU(), nn.Linear(256, 10)]
        return nn.Sequential(*layers)
    for before, after in ((784, 1024), (1024, 1024)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    (name,) = sys.argv[1:] or ["wide"]
    batch, *shape = SHAPES[name]
    plain, plain_loss = network(name), nn.CrossEntropyLoss()
    x = torch.randn(batch, *shape)
    target = torch.randint(0, plain[-1].out_features, (batch,))
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)

    net = network(name)
    net, optimizer, loss, _ = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, target), batch_size=batch),
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

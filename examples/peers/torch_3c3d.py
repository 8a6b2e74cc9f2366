"""Time a PyTorch version of the `3c3d` row of `jaxprop bench`, forward and backward.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/python examples/peers/torch_3c3d.py

The runs alternate between eager mode and `torch.compile`, where that works, and between images with
channels first and channels last. The script prints the median time of each.
"""

import statistics
import time

import torch
from torch import nn

BATCH, ROUNDS = 64, 15


def network():
    torch.manual_seed(0)

    def same_pool(low, high):  # TensorFlow's "SAME" padding, with an odd element at the end
        return nn.ConstantPad2d((low, high, low, high), -torch.inf), nn.MaxPool2d(3, 2)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), *same_pool(0, 1)),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), *same_pool(0, 1)),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), *same_pool(0, 1)),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()),
        nn.Linear(256, 10),
    )


def stepper(layout, compiled):
    net, loss = network().to(memory_format=layout), nn.CrossEntropyLoss()
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=layout)
    target = torch.randint(0, 10, (BATCH,))
    value = (
        torch.compile(lambda: loss(net(x), target)) if compiled else lambda: loss(net(x), target)
    )

    def step():
        net.zero_grad()
        value().backward()

    step()
    return step


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main():
    steps = {}
    for layout, words in (
        (torch.contiguous_format, "channels first"),
        (torch.channels_last, "channels last"),
    ):
        steps[f"eager, {words}"] = stepper(layout, compiled=False)
        try:
            steps[f"compiled, {words}"] = stepper(layout, compiled=True)
        except Exception as error:  # for example, there is no C++ compiler
            print(f"torch.compile, {words}: {type(error).__name__}")
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(timed(step))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}")
    for name, samples in times.items():
        print(f"{name:26} {1e3 * statistics.median(samples):8.1f} ms")


if __name__ == "__main__":
    main()

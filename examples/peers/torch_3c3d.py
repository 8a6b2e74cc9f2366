"""The step of the `3c3d` row of `jaxprop bench` in PyTorch: forward and backward, on this machine.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/python examples/peers/torch_3c3d.py

Medians of the loss and its gradient, eagerly and by `torch.compile` where that works, with images
channels first and channels last, in turn.
"""

import statistics
import time

import torch
from torch import nn

BATCH, ROUNDS = 64, 15


def network():
    torch.manual_seed(0)

    def same_pool(low, high):  # "SAME" padding as TensorFlow has it: the odd element goes high
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
        except Exception as error:  # no C++ compiler, say
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

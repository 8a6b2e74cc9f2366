"""Time a PyTorch version of the `lstm` row of `jaxprop bench`, forward and backward.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/python examples/peers/torch_lstm.py

The script prints the median time of a step over 50 runs.
"""

import statistics
import time

import torch
from torch import nn

BATCH, LENGTH, FEATURES, CLASSES, RUNS = 32, 64, 256, 10, 50


def main():
    torch.manual_seed(0)
    lstm, head = nn.LSTM(FEATURES, FEATURES, batch_first=True), nn.Linear(FEATURES, CLASSES)
    loss, params = nn.CrossEntropyLoss(), [*lstm.parameters(), *head.parameters()]
    x = torch.randn(BATCH, LENGTH, FEATURES)
    target = torch.randint(0, CLASSES, (BATCH, LENGTH))

    def step():
        for param in params:
            param.grad = None
        loss(head(lstm(x)[0]).flatten(0, 1), target.flatten()).backward()

    times = []
    for _ in range(RUNS + 3):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"LSTM step {1e3 * statistics.median(times[3:]):.1f} ms")


if __name__ == "__main__":
    main()

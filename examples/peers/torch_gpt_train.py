"""Train the GPT of `examples/gpt.py` in PyTorch, with the same windows, optimizer and steps.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 numpy
    peers/bin/python examples/peers/torch_gpt_train.py --steps 2000

Initial weights come from the same distributions, but from another random generator. The two runs
should end as close to each other as two seeds of one of them.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))
from corpus import load, starts
from torch_gpt import LENGTH, WIDTH, Gpt

WARMUP, RATE, REPORTS = 100, 2e-3, 10


def initialize(net):
    """Draw the weights from the distributions of the `init` of jaxprop's layers."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            # The standard deviation before the normal is truncated at two of them.
            std = module.in_features**-0.5 / 0.87962566
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(module.bias)
    nn.init.normal_(net.embedding.weight, std=WIDTH**-0.5)
    nn.init.normal_(net.positions, std=0.02)


def windows(text, starts):
    """Return the bytes of each window, and the byte after each of them."""
    cut = text[torch.as_tensor(starts)[:, None] + torch.arange(LENGTH + 1)]
    return cut[:, :-1], cut[:, 1:]


def main():
    parser = argparse.ArgumentParser(description="Train a GPT to write Python, in PyTorch.")
    for name, default, meaning in (
        ("steps", 2000, "training steps"),
        ("batch", 16, "windows per step"),
        ("seed", 0, "seed of the run"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)"
        )
    args = parser.parse_args()
    text, held_out = load(args.seed)
    order = starts(args.seed, args.steps, args.batch, LENGTH, text)
    at = starts(args.seed + 1, 8, 32, LENGTH, held_out)
    text, held_out = (torch.tensor(part).long() for part in (text, held_out))

    torch.manual_seed(args.seed)
    net = Gpt()
    initialize(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0, betas=(0.9, 0.95))
    warmup = min(WARMUP, args.steps // 2)

    def rate(step):
        if step < warmup:
            return RATE * step / warmup
        done = (step - warmup) / (args.steps - warmup)
        return RATE * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, each, values = time.perf_counter(), math.ceil(args.steps / REPORTS), []
    for step in range(args.steps):
        optimizer.zero_grad()
        value = net(*windows(text, order[step]))
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        values.append(value.item())
        if (step + 1) % each == 0 or step + 1 == args.steps:
            with torch.no_grad():
                bits = sum(net(*windows(held_out, rows)).item() for rows in at) / len(at)
            print(
                f"step {step + 1:6d}  train {sum(values) / len(values) / math.log(2):.3f}  "
                f"held out {bits / math.log(2):.3f} bits per byte  "
                f"{time.perf_counter() - start:5.0f} s",
                flush=True,
            )
            values = []


if __name__ == "__main__":
    main()

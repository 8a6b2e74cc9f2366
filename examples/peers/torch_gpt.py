"""Time a small GPT of six pre-norm blocks in PyTorch, forward and backward.

    python3 -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/python examples/peers/torch_gpt.py

The GPT has 256 features, 4 heads, a vocabulary of 128, learned positions, a final LayerNorm, and an
embedding tied to the output. The batch is 8 windows of 128 tokens. Eager and compiled runs
alternate, and the script prints the median and the best time of each.
"""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

BATCH, LENGTH, WIDTH, HEADS, BLOCKS, VOCABULARY = 8, 128, 256, 4, 6, 128
SECONDS = 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        n, t, d = x.shape
        packed = self.qkv(self.norm_1(x)).view(n, t, 3, HEADS, d // HEADS)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens, target):
        y = self.norm(self.blocks(self.embedding(tokens) + self.positions))
        logits = y @ self.embedding.weight.T
        return F.cross_entropy(logits.view(-1, VOCABULARY), target.reshape(-1))


def main():
    torch.manual_seed(0)
    net = Gpt()
    tokens, target = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH))

    def timed(forward):
        start = time.perf_counter()
        net.zero_grad()
        forward(tokens, target).backward()
        return time.perf_counter() - start

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    sides = {"eager": net, "torch.compile": torch.compile(net)}
    for forward in sides.values():
        timed(forward), timed(forward)
    samples = {name: [] for name in sides}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, forward in sides.items():
            samples[name].append(timed(forward))
    for name, times in samples.items():
        print(f"{name:14} {1e3 * statistics.median(times):8.1f} ms, best {1e3 * min(times):.1f}")


if __name__ == "__main__":
    main()

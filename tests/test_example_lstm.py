"""The LSTM that learns to write Python, in a tiny configuration."""

import re

import pytest
from test_examples import run


@pytest.mark.full
def test_lstm_by_hand_and_by_autodiff():
    argv = ("--steps", 20, "--features", 16, "--batch", 4)
    ends = []
    for how in ("--hand", "--auto"):
        out = run("lstm.py", how, *argv)
        assert max(map(len, out.splitlines())) <= 80
        bits = [float(number) for number in re.findall(r"held out (\S+) bits", out)]
        assert len(bits) == 10
        assert 3 < bits[-1] < bits[0] < 7.1
        ends.append(bits[-1])
    assert ends[0] == pytest.approx(ends[1], abs=2e-3)

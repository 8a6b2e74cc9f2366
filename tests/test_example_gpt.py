"""The GPT that learns to write Python, in a tiny configuration."""

import re

import pytest
from test_examples import run

TINY = ("--layers", 2, "--features", 16, "--heads", 2, "--length", 16, "--batch", 4)
TINY += ("--steps", 12, "--reports", 3, "--sample", 20)


def bits(out):
    return [float(number) for number in re.findall(r"held out (\S+) bits", out)]


@pytest.mark.full
def test_by_hand_by_autodiff_fused_and_in_bfloat16():
    ends = {}
    for how in (("--hand",), ("--auto",), ("--fused",), ("--dtype", "bfloat16", "--recompute")):
        out = run("gpt.py", *how, *TINY)
        assert max(map(len, out.splitlines())) <= 80
        assert len(bits(out)) == 3
        assert 4 < bits(out)[-1] < bits(out)[0] < 8
        ends[how[-1]] = bits(out)[-1]
    assert ends["--hand"] == pytest.approx(ends["--auto"], abs=2e-3)
    assert ends["--hand"] == pytest.approx(ends["--fused"], abs=2e-3)
    assert ends["--hand"] == pytest.approx(ends["--recompute"], abs=0.05)


@pytest.mark.full
def test_resumed_is_the_same_run(tmp_path):
    whole = run("gpt.py", *TINY, "--checkpoints", tmp_path / "a")
    again = run("gpt.py", *TINY, "--checkpoints", tmp_path / "a", "--resume")
    assert whole.splitlines()[-3:] == again.splitlines()[-3:]
    assert bits(again) == []

"""The two scripts on 32 x 32 images, in tiny configurations."""

import re

import pytest
from test_examples import refused, run

TINY = ("--examples", 100, "--batch", 16, "--epochs", 3)
NORMS = r"gradient norms [\d.]+ to [\d.]+$"
SCALE = r"noise scale (?:above )?\d+$"


@pytest.mark.full
@pytest.mark.parametrize(
    ("script", "observed"),
    [
        (("three_c3d.py",), NORMS),
        (("resnet.py", "--features", 8, "--stages", 2), SCALE),
    ],
    ids=["3c3d", "resnet"],
)
def test_by_hand_and_by_autodiff(script, observed):
    ends = []
    for grad in ("hand", "auto"):
        out = run(*script, *TINY, "--grad", grad)
        assert max(map(len, out.splitlines())) <= 80
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
        assert len(losses) == len(re.findall(observed, out, re.MULTILINE)) == 3
        assert losses[-1] < losses[0]
        assert "on 20 images held out of training" in out
        ends.append(losses[-1])
    assert ends[0] == pytest.approx(ends[1], abs=2e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--examples", 20), "--examples is from 50 to 1797"),
        (("--examples", 100, "--batch", 81), "at most four fifths of --examples"),
        (("--features", 6), "--features is a multiple of 4"),
    ],
)
def test_says_what_is_wrong_before_training(argv, message, monkeypatch, capsys):
    assert message in refused("resnet.py", argv, monkeypatch, capsys)

"""The examples, run as a reader would run them: each in its own process."""

import functools
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxprop as jp

GPT = ("--layers", 1, "--features", 8, "--heads", 2, "--length", 8, "--batch", 2)
GPT += ("--steps", 2, "--reports", 1, "--sample", 5, "--fused")
EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def command(script, *argv):
    return [sys.executable, str(EXAMPLES / script), *map(str, argv)]


def run(script, *argv, environment=ENVIRONMENT):
    done = subprocess.run(command(script, *argv), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(script, argv, monkeypatch, capsys):
    """Run a script in this process until it rejects its arguments; return its message."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    code = stopped.value.code
    assert code not in (0, None)
    return capsys.readouterr().err if isinstance(code, int) else code


SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if "run(main)" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_a_line_for_each_option_with_its_default(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert stopped.value.code == 0
    usage, _, options = capsys.readouterr().out.partition("\noptions:\n")
    lines = options.splitlines()
    assert all(len(line) <= 80 for line in (*usage.splitlines(), *lines))
    for line in lines:
        option = re.match(r"  (?:-h, )?--([\w-]+)( \S+)*  +\S", line)
        assert option, line
        takes_a_value = option.group(2) is not None
        none = option.group(1) in ("checkpoints", "plot", "coordinator")
        assert ("(default: " in line) == (takes_a_value and not none), line


def test_every_script_ends_by_the_same_rules():
    mains = [path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()]
    assert sorted(mains) == sorted([*SCRIPTS, "core.py", "two_layer.py"])


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("closed", "said", "code"),
    [(False, b"digits.py: interrupted\n", 130), (True, b"", 128 + signal.SIGPIPE)],
    ids=["ctrl-c", "closed pipe"],
)
def test_an_end_from_outside_leaves_no_traceback(closed, said, code, tmp_path):
    argv = command("digits.py", "--epochs", 2000, "--checkpoints", tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(argv, env=ENVIRONMENT, **pipes) as running:
        assert running.stdout.readline().startswith(b"epoch")
        if closed:
            running.stdout.close()
        else:
            running.send_signal(signal.SIGINT)
        assert running.stderr.read() == said
    assert running.returncode == code


def final_state(directory):
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return step, jax.tree.map(np.asarray, manager.restore(step, args=args)["state"])


def test_two_layer():
    out = run("two_layer.py")
    assert "w1..w4 0.29959556 0.24919112 0.39964496 0.34928991" in out
    assert "w5..w8 0.43703857 0.38685205 0.69629578 0.59624247" in out
    assert "E 0.02397190 -> 0.02323634" in out


@pytest.mark.full
def test_core_is_the_library_s_numbers_in_a_hundred_lines():
    assert "equal; the norms are" in run("core.py")  # asserted by the script itself
    assert len((EXAMPLES / "core.py").read_text().splitlines()) <= 100


SMALL = {
    "digits.py": (("--epochs", 2), r"accuracy \S+%"),
    "private_sgd.py": (("--epochs", 1), r"epsilon \S+ at delta"),
    "flax_private.py": (("--epochs", 1), r"epsilon \S+ at delta"),
    "equinox_noise_scale.py": (
        ("--steps", 4, "--reports", 2, "--features", 8, "--heads", 2, "--length", 8, "--batch", 4),
        r"bits per byte  noise scale +\S+ windows",
    ),
    "kfac.py": (
        ("--steps", 25, "--adam-steps", 25, "--threshold", 0.6),
        r"K-FAC \d+ steps, Adam \d+ steps",
    ),
    "learning_rules.py": (
        ("--net", "mlp", "--epochs", 1, "--seeds", 1),
        r"feedback alignment +\S+ +\S+% +\S+ to \S+ +\d+ +\d+ +\d+ +\d+",
    ),
    "spiking.py": (("--epochs", 1, "--steps", 5, "--features", 16), r"held out \S+%"),
    "local_learning.py": (("--epochs", 1, "--features", 16), r"held out \S+%"),
    "attribution.py": (
        (
            "--epochs",
            1,
        ),
        r"at random +\d+%",
    ),
    "influence.py": (("--steps", 20, "--left-out", 3), r"influence by the Hessian +\S+"),
    "laplace.py": (("--epochs", 2), r" mean +\d+% +\S+ +\S+"),
    "spectrum.py": (
        (*GPT[:10], "--train", 2, "--lanczos", 6, "--probes", 1, "--cg", 3),
        r"negative part of sum \|λ\| +\S+% +\S+%[^%]*a Newton step, 3 products",
    ),
    "tracin.py": (("--epochs", 3), r"flipped labels: area \S+"),
    "gpt.py": (GPT, r"held out \S+ bits"),
    "lstm.py": (("--steps", 10, "--features", 8, "--batch", 2), r"held out \S+ bits"),
    "resnet.py": (
        ("--features", 4, "--stages", 1, "--examples", 50, "--batch", 8, "--epochs", 1),
        r"on 10 images held out of training",
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.full if script in ("lstm.py", "resnet.py") else ())
        for script in SMALL
    ],
)
def test_runs_to_its_end_in_a_small_configuration(script):
    argv, printed = SMALL[script]
    quick_to_compile = ENVIRONMENT | {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
    out = run(script, *argv, environment=quick_to_compile)
    assert re.search(printed, out)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.full
def test_vae_has_two_outputs_and_a_loss_that_falls(monkeypatch):
    out = run("vae.py", "--epochs", 3)
    values = [float(value) for value in re.findall(r"-ELBO (\S+) nats", out)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8 * values[0] < 32
    assert "the largest gradient is that of image" in out
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sample = runpy.run_path(str(EXAMPLES / "vae.py"))["Sample"]()
    x = {name: np.random.default_rng(0).normal(size=(3, 2)) for name in ("mean", "logvar")}
    jp.check_layer(sample, x)
    x, key = jax.tree.map(jnp.asarray, x), jp.Key(jax.random.key(0))
    pulled = []
    for f in (jp.custom_vjp(sample), lambda params, x: sample.forward(params, x)[0]):
        y, pull = jax.vjp(functools.partial(f, key), x)
        pulled.append(pull(jax.tree.map(jnp.cos, y)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *pulled)
    assert len((EXAMPLES / "vae.py").read_text().splitlines()) <= 60


@pytest.mark.full
def test_nan_shows_three_tools_side_by_side():
    out = run("nan.py")
    lines = (EXAMPLES / "nan.py").read_text().splitlines()
    found = re.findall(r"It was born [^`]*? at nan.py:(\d+)[^`]*?:\n    (.*)\n", out)
    assert [source for _, source in found] == [
        "root = jnp.sqrt(h)",
        "return jnp.linalg.norm(h, axis=-1)",
        "h = spot(jnp.sqrt(h - x_t))",
    ]
    assert all(lines[int(number) - 1].strip() == source for number, source in found)
    said = re.findall(r"encountered in (\w+)\n", out)
    assert said == ["mul", "mul", "mul", "mul", "scan", "scan"]
    assert "in step 1 of the scan" in out
    shown = re.search(
        r"```text\n(On the way back layer function.*?)```",
        (EXAMPLES.parent / "README.md").read_text(),
        re.DOTALL,
    )
    assert shown.group(1) in out


def test_two_layer_needs_no_library_but_jax():
    text = (EXAMPLES / "two_layer.py").read_text()
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {"jax"}
    assert len(text.splitlines()) <= 65


@pytest.mark.full
def test_digits_by_hand_and_by_autodiff(tmp_path):
    ends = []
    for grad in ("hand", "auto"):
        plot, checkpoints = tmp_path / f"{grad}.png", tmp_path / grad
        out = run("digits.py", "--grad", grad, "--plot", plot, "--checkpoints", checkpoints)
        accuracy = float(re.search(r"accuracy (\S+)%", out).group(1))
        assert accuracy >= 97
        for picture in ("", "-scales", "-norms", "-gram"):
            path = plot.with_stem(plot.stem + picture)
            assert path.read_bytes().startswith(b"\x89PNG")
        ends.append(final_state(checkpoints)[1]["params"])
    for hand, auto in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(hand, auto, rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_digits_killed_at_any_moment_ends_bitwise_the_same(tmp_path):
    epochs = 20
    run("digits.py", "--epochs", epochs, "--checkpoints", tmp_path / "whole")
    killed = ["digits.py", "--epochs", epochs, "--checkpoints", tmp_path / "killed", "--resume"]
    kills = 0
    # Kills before the first epoch, and milliseconds after the third line: in an epoch or its save.
    for lines, delay in ((0, 0.0), (3, 0.0), (3, 0.004), (3, 0.02), (3, 0.05)):
        with subprocess.Popen(command(*killed), env=ENVIRONMENT, stdout=subprocess.PIPE) as running:
            for _ in range(lines):
                while not running.stdout.readline().startswith(b"epoch"):
                    pass
            time.sleep(delay)
            running.send_signal(signal.SIGKILL)
        kills += running.returncode == -signal.SIGKILL
    assert kills == 5
    out = run(*killed)
    assert "resumed after epoch" in out
    (step, whole), (step_killed, resumed) = map(
        final_state, (tmp_path / "whole", tmp_path / "killed")
    )
    assert step == step_killed == epochs
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.mark.full
def test_digits_refuses_what_would_lose_a_run(tmp_path):
    directory = tmp_path / "run"
    run("digits.py", "--epochs", 1, "--checkpoints", directory)
    for argv, message in (
        ((), "holds checkpoints; add --resume"),
        (("--resume", "--seed", 5), "of a run with --seed 0"),
        (("--resume", "--epochs", 3), "of a run with --epochs 1"),
    ):
        asked = command("digits.py", "--epochs", 1, "--checkpoints", directory, *argv)
        done = subprocess.run(asked, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 1
        assert message in done.stderr
    assert final_state(directory)[0] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--batch", 5000), "more than the 1437 digits"),
        (("--rate", "nan"), "must be above 0"),
        (("--seed", -1), "must be a whole number"),
        (("--plot", "/no/such/x.png"), "no such directory"),
        (("--resume",), "--resume needs --checkpoints"),
        (("--checkpoints", __file__), "is not a directory"),
    ],
)
def test_digits_says_what_is_wrong_before_training(argv, message, monkeypatch, capsys):
    said = refused("digits.py", argv, monkeypatch, capsys)
    assert message in said
    assert "Traceback" not in said


@pytest.mark.full
def test_private_sgd_prints_its_epsilon():
    out = run("private_sgd.py", "--epochs", 20)
    assert float(re.search(r"epsilon (\S+)", out).group(1)) == pytest.approx(4.6, abs=0.3)
    assert float(re.search(r"accuracy (\S+)%", out).group(1)) >= 85


@pytest.mark.full
def test_flax_private_prints_the_epsilon_of_private_sgd():
    settings = ("--epochs", 10, "--batch", 100, "--noise", 2)
    out, other = run("flax_private.py", *settings), run("private_sgd.py", *settings)
    epsilon, accuracy = (r"epsilon (\S+) at delta", r"accuracy (\S+)%")
    assert re.search(epsilon, out).group(1) == re.search(epsilon, other).group(1)
    assert float(re.search(accuracy, out).group(1)) >= 85
    assert len(re.findall("(Patches|Outer)$", out, re.MULTILINE)) == 3


@pytest.mark.full
def test_the_noise_scale_of_an_equinox_transformer_grows_as_it_learns():
    out = run("equinox_noise_scale.py", "--steps", 150, "--reports", 3, "--features", 32)
    bits = [float(number) for number in re.findall(r"train (\S+) bits", out)]
    scales = [float(number) for number in re.findall(r"noise scale +(\S+) windows", out)]
    assert bits == sorted(bits, reverse=True)
    assert 0 < scales[0] < scales[-1]


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("flax_private.py", ("--batch", 5000), "--batch is at most the 1437 images"),
        ("equinox_noise_scale.py", ("--batch", 1), "from at least 2 windows"),
        ("equinox_noise_scale.py", ("--heads", 3), "--heads must divide --features"),
    ],
)
def test_what_an_example_refuses(script, argv, message, monkeypatch, capsys):
    assert message in refused(script, argv, monkeypatch, capsys)


@pytest.mark.full
def test_attention_is_held_to_what_jax_has():
    """On a CPU there are no kernels, and no cuDNN."""
    lines = run("peers/attention.py", "--quick").splitlines()
    assert [len(line.split("(")) for line in lines[2:]] == [5, 5]


@pytest.mark.full
def test_kfac_takes_fewer_steps_than_tuned_adam(tmp_path):
    given = "--steps", 80, "--adam-steps", 600, "--threshold", 0.26, "--plot", tmp_path / "kfac.png"
    out = run("kfac.py", *given)
    kfac, adam = map(int, re.search(r"K-FAC (\d+) steps, Adam (\d+) steps", out).groups())
    assert kfac < adam / 3
    assert (tmp_path / "kfac.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_digits_on_a_terminal_shows_what_goes_on():
    here, there = os.openpty()
    environment = ENVIRONMENT | {"COLUMNS": "140", "TERM": "xterm"}
    argv = command("digits.py", "--epochs", 5)
    with subprocess.Popen(argv, env=environment, stdout=there, stderr=subprocess.PIPE) as running:
        os.close(there)
        shown = b""
        while True:
            try:
                shown += os.read(here, 65536)
            except OSError:  # on Linux, when the other end is closed
                break
        assert running.stderr.read() == b""
    os.close(here)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert running.returncode == 0
    last = re.findall(r"loss (\S+)  (\S+) examples/s gradient (\S+)  noise scale (\S+)", text)[-1]
    assert "nan" not in last

"""Training by several processes, and what remains when one of them fails."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("--length", 16, "--features", 32, "--layers", 2, "--heads", 2, "--batch", 8)
TINY += ("--steps", 6, "--reports", 3)
WAIT = 150  # seconds, for what takes ten on an idle machine
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
FLAGS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
TIMEOUT, BOUND = ("--timeout", 20), 20 + 30
unix = pytest.mark.skipif(os.name == "nt", reason="signals")

# Runs instead of the script in the process at fault, whose two devices read twice a step. When it
# fails, the checkpoint of step 2 of 6 is complete, and that of step 4 too, unless the other process
# never gets there because it waits for this one (as with jax 0.8).
AT_STEP_5 = """
import os, resource, signal, sys, time
from pathlib import Path
import checkpoints, distributed

last = Path(sys.argv[sys.argv.index("--checkpoints") + 1]) / "4"
read, calls = distributed.windows, 0

def windows(*args):
    global calls
    calls += 1
    if calls == 2 * 4 + 1:
        end = time.monotonic() + 5
        while not last.exists() and time.monotonic() < end:
            time.sleep(0.01)
        fail()
    return read(*args)

distributed.windows = windows
"""
KILL = "def fail():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
STOP = "def fail():\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
RAISE = "def fail():\n    raise OSError('the disk under the text is gone')\n"
# The others have begun to write the checkpoint of step 4; this process never will.
AT_SAVE = """
save = checkpoints.Checkpoints.save
def killed(self, done, run):
    if done == 4:
        self.manager.wait_until_finished()
        fail()
    save(self, done, run)
checkpoints.Checkpoints.save = killed
"""
# glibc returns large freed arrays to the system, so the next step has to ask for memory again.
EXHAUST = """
def fail():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**25
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
"""


@pytest.fixture(scope="module")
def launch():
    """``launch(directory, processes, *argv)`` starts processes, the one ``at`` with a ``fault``."""
    started = []

    def launch(directory, processes, *argv, fault=None, at=-1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "MALLOC_MMAP_THRESHOLD_": "1000000",
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]),
            "XLA_FLAGS": FLAGS,
        }
        run = []
        for process in range(processes):
            script = [str(EXAMPLES / "distributed.py")]
            if fault is not None and process == range(processes)[at]:
                script = ["-c", f"{AT_STEP_5}{fault}\ndistributed.main()"]
            which = ["--coordinator", address, "--processes", processes, "--process", process]
            which = which if processes > 1 else []
            command = [*script, *TINY, "--checkpoints", directory, *which, *argv]
            command = [sys.executable, *map(str, command)]
            run.append(subprocess.Popen(command, env=environment, **PIPES))
            started.append(run[-1])
        return run

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def finish(run):
    """The report of process 0 from a run in which nothing failed."""
    ends = [process.communicate(timeout=WAIT) for process in run]
    assert [process.returncode for process in run] == [0] * len(run), ends
    assert not any("bits per byte" in out for out, _ in ends[1:])
    return [line for line in ends[0][0].splitlines() if not line.startswith("[Gloo]")]


def final_state(directory):
    """The step and the leaves, by name, of the newest checkpoint, whoever wrote it."""
    step = max(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        path = directory.resolve() / str(step) / "state"
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            dict(reader.metadata(path).item_metadata),
        )
        leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path, like))
    return step, {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def assert_same_to_rounding(one, other):
    """To 2e-6 of each leaf's norm: float32 sums over the batch in another order, for six steps.

    Except for the bias of attention's keys, and Adam's moments for it: softmax does not depend on
    it, so its gradient is only rounding, which Adam turns into steps of full length.
    """
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        if "[1][1][0][1]['b']" in name:
            assert a.shape == (2, 96)
            a, b = (np.delete(leaf, slice(32, 64), axis=1) for leaf in (a, b))
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), name


@pytest.fixture(scope="module")
def whole(launch, tmp_path_factory):
    """The report and the final state from two processes without a fault."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return finish(launch(directory, 2)), final_state(directory)[1]


def losses(lines):
    return [float(line.split()[2]) for line in lines if line.startswith("step")]


@pytest.mark.full
def test_two_processes_train_as_one_does(launch, tmp_path, whole):
    two, state = whole
    one = finish(launch(tmp_path / "one", 1))
    assert two[0] == "30,080 params; devices: 4, processes: 2"
    assert one[0] == "30,080 params; devices: 2, processes: 1"
    assert len(losses(two)) == 3
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1.01e-4)
    assert losses(two)[-1] < losses(two)[0] < 8
    assert max(map(len, two)) <= 80
    assert_same_to_rounding(state, final_state(tmp_path / "one")[1])


def failed(run, at):
    """(Seconds from the end of the process at fault to the other's end, the former's stderr)."""
    _, cause = run[at].communicate(timeout=WAIT)
    start = time.perf_counter()
    _, other = run[1 - at].communicate(timeout=WAIT)
    assert all(process.returncode for process in run)
    assert f"process {1 - at} stops" in other or "another task died" in other
    return time.perf_counter() - start, cause


@pytest.mark.full
@unix
def test_killed_in_a_save_and_gone_on_with_by_two_and_by_one(launch, tmp_path, whole):
    seconds, _ = failed(launch(tmp_path / "two", 2, *TIMEOUT, fault=KILL + AT_SAVE), at=1)
    assert seconds < BOUND
    assert final_state(tmp_path / "two")[0] == 2
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for processes, directory in ((2, "two"), (1, "one")):
        lines = finish(launch(tmp_path / directory, processes, "--resume"))
        assert "resumed after step 2" in lines
        step, state = final_state(tmp_path / directory)
        assert step == 6
        if processes == 1:
            assert_same_to_rounding(state, whole[1])
        else:
            assert state.keys() == whole[1].keys()
            assert all(leaf.tobytes() == whole[1][name].tobytes() for name, leaf in state.items())


@pytest.mark.full
@unix
def test_one_process_killed_and_the_run_gone_on_with_by_two(launch, tmp_path, whole):
    (run,) = launch(tmp_path / "run", 1, fault=KILL)
    run.communicate(timeout=WAIT)
    assert run.returncode == -signal.SIGKILL
    assert "resumed after step 4" in finish(launch(tmp_path / "run", 2, "--resume"))
    assert_same_to_rounding(final_state(tmp_path / "run")[1], whole[1])


@pytest.mark.full
@unix
@pytest.mark.parametrize(
    ("fault", "at", "said"),
    [
        (KILL, 0, ""),
        (RAISE, 1, "OSError: the disk under the text is gone\nprocess 1 stops"),
    ],
    ids=("process 0 is killed", "data cannot be read"),
)
def test_one_fails_and_both_end(launch, tmp_path, fault, at, said):
    seconds, cause = failed(launch(tmp_path / "run", 2, *TIMEOUT, fault=fault, at=at), at)
    assert seconds < BOUND
    assert said in cause
    assert final_state(tmp_path / "run")[0] in (2, 4)


@pytest.mark.full
@unix
def test_one_hangs_and_the_other_ends(launch, tmp_path):
    run = launch(tmp_path / "run", 2, "--timeout", 5, fault=STOP)
    _, survivor = run[0].communicate(timeout=WAIT)
    assert run[0].returncode
    assert "heartbeat" in survivor
    assert final_state(tmp_path / "run")[0] in (2, 4)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory as Linux has them")
def test_out_of_memory_is_said_and_leaves_the_last_checkpoint(launch, tmp_path):
    (run,) = launch(tmp_path / "run", 1, "--batch", 2048, fault=EXHAUST)
    _, error = run.communicate(timeout=WAIT)
    assert run.returncode == 1
    assert "Out of memory allocating" in error
    step, state = final_state(tmp_path / "run")
    assert step == 4
    assert all(np.isfinite(leaf).all() for leaf in state.values())

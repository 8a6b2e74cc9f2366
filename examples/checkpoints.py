"""Checkpoints of a training run, shared by the examples."""

import sys
from pathlib import Path
from typing import Any

import jax


def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


class Checkpoints:
    """The checkpoints of one run, written by orbax.

    An interrupted save leaves no partial checkpoint.

    Args:
        directory: the directory of the checkpoints, created if needed.
        settings: the options that a resumed run must share, by name.
        resume: whether the directory may already hold checkpoints.

    Raises:
        SystemExit: for a path that is a file, and for checkpoints without ``resume``.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], resume: bool) -> None:
        import orbax.checkpoint as ocp

        if directory.exists() and not directory.is_dir():
            sys.exit(f"{directory} is not a directory")
        self.args, self.settings = ocp.args, settings
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = ocp.CheckpointManager(directory.resolve(), options=options)
        if self.manager.latest_step() is not None and not resume:
            sys.exit(f"{directory} holds checkpoints; add --resume, or name another directory")

    def restore(self, like: Any) -> Any:
        """Return the newest saved state, or ``like`` if there is none.

        Args:
            like: a state with the structure, shapes, dtypes and shardings to restore to.

        Raises:
            SystemExit: for checkpoints of a run with other settings.
        """
        step = self.manager.latest_step()
        if step is None:
            return like
        args = self.args.Composite(settings=self.args.JsonRestore())
        for name, value in self.manager.restore(step, args=args)["settings"].items():
            if self.settings.get(name) != value:
                sys.exit(f"the checkpoints are of a run with --{name} {value}; resume it with that")
        state = self.args.StandardRestore(jax.tree.map(abstract, like))
        return self.manager.restore(step, args=self.args.Composite(state=state))["state"]

    def save(self, epoch: int, tree: Any) -> None:
        """Start saving a state under a step number; the newest two checkpoints are kept."""
        state, settings = self.args.StandardSave(tree), self.args.JsonSave(self.settings)
        self.manager.save(epoch, args=self.args.Composite(state=state, settings=settings))

    def close(self) -> None:
        """Wait for the pending save, then release orbax's resources."""
        self.manager.wait_until_finished()
        self.manager.close()

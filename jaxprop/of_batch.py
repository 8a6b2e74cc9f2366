"""What a function of a batch is made of: its parts, and what is made of them at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExample:
    """Marks arrays that hold something of each example along ``axis``.

    What has no mark is a mean over examples. The axis counts from the end where ``repeat`` may
    stack the arrays of its layers in front.
    """

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})


def unmarked(tree: Any) -> Any:
    """The tree with the arrays themselves where they are marked."""

    def value(node: Any) -> Any:
        return node.value if is_marked(node) else node

    return jax.tree.map(value, tree, is_leaf=is_marked)


class OfBatch:
    """A function of (params, x, target, key=None) that says how micro-batches make up a batch.

    Args:
        parts: a function of the same arguments. What it gives for equal micro-batches makes up
            what it gives for the batch: means over examples are averaged, and what is marked
            ``PerExample`` is laid side by side.
        finish: ``finish(parts, examples, params)``, with the key where one is given, makes the
            result of the batch's parts. What is not linear in the examples, and what is done once,
            is done here.
        whole: what gives the same as ``finish`` of ``parts`` in less memory, for a whole batch.
    """

    def __init__(
        self,
        parts: Callable[..., Any],
        finish: Callable[..., Any] = lambda parts, examples, params, **given: unmarked(parts),
        whole: Callable[..., Any] | None = None,
    ) -> None:
        self.parts, self.finish = parts, finish
        self._whole = whole or self._finished
        self.__name__ = "of_batch"  # for profiles: jax.jit names its program so

    def __call__(
        self, params: Any, x: Any, target: Any, key: chex.PRNGKey | None = None, **options: Any
    ) -> Any:
        return self._whole(params, x, target, **with_key(key, options))

    def then(self, f: Callable[[Any], Any]) -> OfBatch:
        """f of what this gives."""
        return OfBatch(
            self.parts,
            lambda *args, **given: f(self.finish(*args, **given)),
            lambda *args, **given: f(self._whole(*args, **given)),
        )

    def _finished(self, params: Any, x: Any, target: Any, **given: Any) -> Any:
        parts = self.parts(params, x, target, **given)
        return self.finish(parts, jax.tree.leaves(x)[0].shape[0], params, **given)


def is_marked(node: object) -> bool:
    return isinstance(node, PerExample)


def with_key(key: chex.PRNGKey | None, options: dict[str, Any]) -> dict[str, Any]:
    return options if key is None else {"key": key, **options}

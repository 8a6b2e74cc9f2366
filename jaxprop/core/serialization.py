"""Tree nodes in programs that ``jax.export`` writes to disk."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from jax import export

Node = TypeVar("Node", bound=type)


def serializable(cls: Node) -> Node:
    """Register a class of tree nodes, so that ``jax.export`` can write a program with such nodes.

    The program can be read wherever ``jaxprop`` is imported. This is only for the classes of this
    library; register other classes through ``jax.export.register_namedtuple_serialization`` or
    ``register_pytree_node_serialization``.

    Args:
        cls: a NamedTuple, or a dataclass that is a pytree. Static fields are written as JSON. If a
            field comes back from it with another type, its metadata has a function ``read`` that
            restores the field.
    """
    node: Any = cls
    name = f"jaxprop.{cls.__name__}"
    if issubclass(cls, tuple):
        return export.register_namedtuple_serialization(node, serialized_name=name)
    fields = dataclasses.fields(node)
    static = [field for field in fields if field.metadata.get("static")]
    names = [field.name for field in fields if field not in static]

    def written(values: tuple[Any, ...]) -> bytes:
        return json.dumps(values).encode()

    def read(text: bytes | bytearray) -> tuple[Any, ...]:
        values = zip(static, json.loads(text.decode()), strict=True)
        return tuple(field.metadata.get("read", _tuples)(_tuples(value)) for field, value in values)

    def made(aux_data: Any, children: Any) -> Any:
        rest = dict(zip((field.name for field in static), aux_data, strict=True))
        return node(**dict(zip(names, children, strict=True)), **rest)

    return export.register_pytree_node_serialization(
        node,
        serialized_name=name,
        serialize_auxdata=written,
        deserialize_auxdata=read,
        from_children=made,
    )


def _tuples(value: Any) -> Any:
    """Return the value with the lists that JSON makes of tuples turned back into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value

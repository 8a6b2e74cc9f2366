"""The base class of layers, losses and quantities: plain facts as a pytree without leaves."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from typing import Any, dataclass_transform

import jax


@dataclass_transform(frozen_default=True)
class Static(abc.ABC):
    """A frozen dataclass of plain, hashable facts, which JAX treats as a pytree without leaves.

    Subclasses become dataclasses without a decorator: write only the fields and the methods.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base is not Static and issubclass(base, Static) and not inspect.isabstract(base):
                raise TypeError(
                    f"{cls.__name__} subclasses {base.__name__}; to change what it does, hold it "
                    "in a field and call it (a layer as a jp.Wrapper does)"
                )
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        jax.tree_util.register_static(cls)

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                shown.append(repr(value))
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

"""What layers around one other share."""

from __future__ import annotations

from typing import Any

import chex

from jaxprop.layer import Layer


class Wrapper(Layer):
    """A layer around another, whose params are the inner one's, and are held to *its* ``init``.

    Subclass it to change what a layer does. If ``forward`` keeps more than the inner layer's
    residuals, ``inside`` says where those are.
    """

    layer: Layer

    def init(self, key: chex.PRNGKey, x: Any) -> Any:
        return self.layer.init(key, x)

    def check_params(self, params: Any, x: Any) -> None:
        """Nothing: the inner layer checks them."""

    def inside(self, residuals: Any) -> tuple[Layer, Any]:
        """The layer within, and what it keeps of these residuals."""
        return self.layer, residuals

    def rounded(self, params: Any, dtype: Any) -> Any:
        return self.layer.rounded(params, dtype)

    def given(self, params: Any, *, key: chex.PRNGKey | None = None, mask: Any = None) -> Any:
        return self.layer.given(params, key=key, mask=mask)

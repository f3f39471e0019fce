"""The protocol of what stands in a block's branches, and the pair that any body has without writing one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx

from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.linear import TRAINED, LinearGroup, barrier
from jaxsloth.jax_backend.run import Run


class Pair(Protocol):
    """A forward that keeps, and its backward. x is ``[tokens, hidden + pad]``, dy ``[tokens, hidden + run.stream_pad]``, with
    free columns behind the rows."""

    @property
    def pad(self) -> int: ...

    @property
    def out_pad(self) -> int:
        """Free columns that it wants behind the rows of dy."""
        ...

    def kept_widths(self, mode: str) -> int:
        """Elements a token that it keeps."""
        ...

    def working_width(self) -> int:
        """About the most elements a token that it works with at a time."""
        ...

    def forward_keeping(self, x: Any, run: Run, mode: str | None) -> tuple[Any, dict[str, Any]]:
        """(y ``[tokens, hidden]``, what is kept); mode: what `gradient_checkpointing` keeps."""
        ...

    def backward(self, dy: Any, kept: dict[str, Any], run: Run, form_x: Callable[[], Any]) -> tuple[Any, Any, dict[str, Any]]:
        """(dx ``[tokens, hidden]``; dy, whose memory may have been written; the gradients of what is trained, by name).

        form_x: forms the input again from what the block keeps.
        """
        ...


class Body(Pair, Protocol):
    """A sublayer of a block in its three moments."""

    def groups(self) -> dict[str, LinearGroup]:
        """Its linear layers by the input they share, in forward order."""
        ...

    def written_refusal(self) -> str | None:
        """Why its own pair can't run, or None."""
        ...

    def forward(self, x: Any, run: Run, cache: Cache | None = None) -> tuple[Any, Cache | None]:
        """(y, the cache with this pass written); ``[batch, length, hidden]`` each way, from ops, differentiable."""
        ...

    def step(self, x: Any, cache: Cache | None, run: Run, packed: Any) -> tuple[Any, Cache | None]:
        """One token a row, ``[rows, hidden]`` each way; packed: by group, what `LinearGroup.packed` made, at this layer."""
        ...


class DefaultPair:
    """The input is kept, or formed again by the block, and the gradient is a local vjp of the body's `forward`."""

    pad = out_pad = 0

    def __init__(self, body: Any, hidden: int) -> None:
        self._body, self._hidden = body, hidden

    def kept_widths(self, mode: str) -> int:
        return self._hidden if mode == "none" else 0

    def working_width(self) -> int:
        return 2 * self._body.working_width()  # autograd keeps all of a body for a moment

    def _rows(self, x: Any, run: Run) -> Any:
        return x[:, : self._hidden].reshape(*run.segments.shape, self._hidden)

    def forward_keeping(self, x: Any, run: Run, mode: str | None) -> tuple[Any, dict[str, Any]]:
        y, _ = self._body.forward(self._rows(x, run), run)
        return y.reshape(-1, y.shape[-1]), {"x": x} if mode == "none" else {}

    def backward(self, dy: Any, kept: dict[str, Any], run: Run, form_x: Callable[[], Any]) -> tuple[Any, Any, dict[str, Any]]:
        structure, trained, frozen = nnx.split(self._body, TRAINED, ...)

        def forward(x: Any, trained: Any) -> Any:
            return nnx.merge(structure, trained, frozen).forward(x, run)[0]

        x = self._rows(kept["x"] if "x" in kept else form_x(), run)
        dx, gradients = jax.vjp(forward, x, trained)[1](self._rows(dy, run))
        named = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
        return barrier((dx.reshape(-1, self._hidden), dy, named))

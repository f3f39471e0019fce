"""RMSNorm, from ops and as the written pass has it: taking the residual sum along, writing into rows with free columns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.linear import Frozen, GetArray, pad_columns
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.rms_norm.contract import MAX_HIDDEN
from jaxsloth.kernels.rms_norm.pallas_kernel import add_norm, add_norm_backward
from jaxsloth.models import spec as specs


class RMSNorm(nnx.Module):
    """A norm with a frozen weight; layer: its index in the stack, None for one that stands alone."""

    def __init__(self, norm: specs.Norm, name: str, get: GetArray, ops: Ops) -> None:
        self.weight = Frozen(get(f"{name}.weight"))
        self._eps, self._offset, self._ops = norm.eps, norm.weight_offset, ops

    def own(self, layer: Any) -> Any:
        """Its weight in one layer."""
        return self.weight[...] if layer is None else self.weight[...][layer]

    def written_refusal(self) -> str | None:
        """Why the kernels can't stand for `forward`, or None."""
        asked, hidden = self._ops.asked_otherwise("rms_norm"), self.weight[...].shape[-1]
        if asked is None and hidden > MAX_HIDDEN:
            return f"rms_norm: its kernel holds rows of at most {MAX_HIDDEN} channels, got {hidden}"
        return asked

    def forward(self, x: Any, layer: Any = None) -> Any:
        return self._ops.rms_norm(x, self.own(layer), eps=self._eps, offset=self._offset)

    def forward_keeping(self, x: Any, delta: Any, pad: int, layer: Any = None) -> tuple[Any, Any, Any]:
        """(the sum normed, ``[tokens, hidden + pad]``; ``x + delta``; the reciprocals that the backward takes)."""
        if self.written_refusal() is not None:
            total = x if delta is None else x + delta
            return pad_columns(self.forward(total, layer), pad), total, jnp.zeros(x.shape[0])
        total, normed, rstd = add_norm(
            x, delta, self.own(layer), eps=self._eps, offset=self._offset, pad=pad, interpret=platform() != "cuda"
        )
        return normed, total, rstd

    def backward(self, x: Any, rstd: Any, dnormed: Any, residual: Any, layer: Any = None, pad: int = 0) -> Any:
        """The gradient of x ``[tokens, hidden]``, with that which comes along the residual stream, where it is given, added; as
        wide as that, else with `pad` free columns."""
        if self.written_refusal() is not None:
            dx = jax.vjp(lambda x: self.forward(x, layer), x)[1](dnormed[:, : x.shape[1]])[0]
            return pad_columns(dx, pad) if residual is None else residual.at[:, : x.shape[1]].add(dx)
        interpret = platform() != "cuda"
        return add_norm_backward(x, self.own(layer), rstd, dnormed, residual, offset=self._offset, pad=pad, interpret=interpret)

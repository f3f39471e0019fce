"""The gated MLP sublayer: gate and up, their activation, down.

Kept by `gradient_checkpointing`: none keeps gate and up; the others keep nothing, and gate and up are formed again a tile of
tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.linear import Linear, LinearGroup, make_linears
from jaxsloth.torch_backend.ops import Ops
from jaxsloth.torch_backend.run import Run, StepRun, padded_rows
from jaxsloth.torch_backend.weights import GetWeight

# Elements of gate and up that are handled at once where they are formed again: 512 MiB of them in half precision.
MLP_TILE = 2**28


class Mlp(nn.Module):
    """See `body.Body`."""

    gate_proj: Linear
    up_proj: Linear
    gate_up_proj: Linear
    down_proj: Linear
    forms_again = True
    OFFLOADED = ()

    def __init__(
        self, spec: specs.Mlp, name: str, index: int, linears: tuple[specs.Linear, ...], get_weight: GetWeight, ops: Ops
    ) -> None:
        super().__init__()
        del name, index
        self._spec, self._ops = spec, ops
        for part, linear in make_linears(linears, get_weight, ops).items():
            self.add_module(part, linear)
        self.gate_up = LinearGroup([self.gate_up_proj] if spec.fused else [self.gate_proj, self.up_proj])
        self.down = LinearGroup([self.down_proj])

    def groups(self) -> Mapping[str, LinearGroup]:
        return {"gate_up": self.gate_up, "down": self.down}

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        if self._spec.fused:
            gate, up = self.gate_up_proj(x, run).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x, run), self.up_proj(x, run)
        return self.down_proj(self._ops.gated_activation(gate, up, kind=self._spec.activation), run)

    def written_refusal(self) -> str | None:
        return self.gate_up.written_refusal() or self.down.written_refusal()

    def pad(self, run: Run) -> int:
        return run.pad(self.gate_up)

    def out_pad(self, run: Run) -> int:
        return run.pad(self.down)

    def kept_widths(self, mode: str) -> tuple[int, int]:
        return (2 * self._spec.width if mode == "none" else 0), 0

    def working_width(self) -> int:
        """Elements a token that the backward works with, beside what is kept."""
        return 3 * self._spec.width

    def forward_keeping(
        self, x: torch.Tensor, out: torch.Tensor, run: Run, mode: str | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        kept: dict[str, Any] = {}
        for rows in self._tiles(x.shape[0], mode == "none"):
            gate_up, xa = self._forward_rows(x[rows], out[rows], run, rows.start)
            if mode == "none":
                # xa lies behind rows that are not kept.
                kept = {"gate_up": gate_up, "xa": None if xa is None else xa.clone()}
            del gate_up
        return out, kept

    def backward(
        self,
        dy: torch.Tensor,
        kept: dict[str, Any],
        form_x: Callable[[], tuple[torch.Tensor, bool]],
        run: Run,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        x, _ = form_x()
        dx = x.new_empty(x.shape[0], self.gate_up.in_features) if needs_dx else None
        gate_up, xa = kept.pop("gate_up", None), kept.pop("xa", None)
        for rows in self._tiles(dy.shape[0], gate_up is not None):
            self._backward_rows(dy[rows], x[rows], gate_up, xa, None if dx is None else dx[rows], run, rows.start)
        return dx

    def step(self, x: torch.Tensor, cache: Any, run: StepRun) -> torch.Tensor:
        del cache
        gate, up = run.few_rows[self.gate_up](x).chunk(2, dim=1)
        h = torch.empty_like(gate, memory_format=torch.contiguous_format)
        self._ops.kernels.activation.activate(gate, up, h, kind=self._spec.activation)
        return run.few_rows[self.down](h)

    def _tiles(self, tokens: int, whole: bool) -> list[slice]:
        count = 1 if whole else -(-tokens * self.gate_up.out_features // MLP_TILE)
        size = -(-tokens // count)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def _gate_up(self, x: torch.Tensor, run: Run, first: int) -> torch.Tensor:
        """Gate and up, with pad columns behind. first: the token that x begins with, here and below."""
        gate_up = padded_rows(x.shape[0], self.gate_up.out_features, run.pad(self.gate_up), x)
        self.gate_up.forward(x, gate_up[:, : self.gate_up.out_features], run, first)
        return gate_up

    def _forward_rows(
        self, x: torch.Tensor, out: torch.Tensor, run: Run, first: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Writes the output; (gate and up with pad columns behind, h·Aᵀ of the last product)."""
        gate_up, width = self._gate_up(x, run, first), self._spec.width
        h = padded_rows(x.shape[0], width, run.pad(self.down), x)
        self._ops.kernels.activation.activate(
            gate_up[:, :width], gate_up[:, width : 2 * width], h[:, :width], kind=self._spec.activation
        )
        return gate_up, self.down.forward(h, out, run, first)

    def _backward_rows(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        gate_up: torch.Tensor | None,
        xa: torch.Tensor | None,
        dx: torch.Tensor | None,
        run: Run,
        first: int,
    ) -> None:
        width = self._spec.width
        gate_up = self._gate_up(x, run, first) if gate_up is None else gate_up
        gate, up = gate_up[:, :width], gate_up[:, width : 2 * width]
        dh = dy.new_empty(dy.shape[0], width)
        self.down.backward_input(dy, dh, run, first)
        # gate and up give way to their gradients, and dh to h, which dA of down_proj needs.
        self._ops.kernels.activation.activate_backward(gate, up, dh, gate, up, dh, kind=self._spec.activation)
        self.down.backward_adapters(dy, dh, xa, run, first)
        del dh
        # x·Aᵀ stands behind the rows of x by now, kept or formed again with gate and up.
        self.gate_up.backward(gate_up, x, x[:, self.gate_up.in_features :], dx, run, first)

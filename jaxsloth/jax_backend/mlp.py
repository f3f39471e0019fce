"""The gated MLP: from ops, written out for training, and for one token a row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.linear import GetArray, Linear, LinearGroup, Place, add_linears, barrier
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.run import Run
from jaxsloth.kernels.gated_activation.pallas_kernel import activate_merged, activate_merged_backward
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.models import spec as specs

# Elements of gate and up that are handled at once where they are formed again: 512 MiB of them in half precision.
MLP_TILE = 2**28


class Mlp(nnx.Module):
    """A body (see body.py). Its input and output are ``[batch, length, hidden]`` in `forward`, flat in the written pair."""

    gate_proj: Linear
    up_proj: Linear
    gate_up_proj: Linear
    down_proj: Linear

    def __init__(self, spec: specs.Mlp, place: Place, part: str, get: GetArray, ops: Ops) -> None:
        self.spec, self._ops, self._hidden = spec, ops, place.spec.hidden
        add_linears(self, place, part, get, ops)

    def groups(self, stream_pad: int = 0) -> dict[str, LinearGroup]:
        """Gate and up; down_proj, whose gradient is the stream's."""
        projections = ("gate_up_proj",) if self.spec.fused else ("gate_proj", "up_proj")
        return {"gate_up": LinearGroup(self, projections), "down": LinearGroup(self, ("down_proj",), stream_pad)}

    @property
    def pad(self) -> int:
        return self.groups()["gate_up"].pad

    @property
    def out_pad(self) -> int:
        return self.groups()["down"].pad

    def written_refusal(self) -> str | None:
        if self.spec.activation == "gelu":
            return "no kernel has erf"
        asked = self._ops.asked_otherwise("gated_activation")
        return asked or next(filter(None, (group.written_refusal() for group in self.groups().values())), None)

    def kept_widths(self, mode: str) -> int:
        xa = sum(group.pad for group in self.groups().values())
        return xa + (self._hidden + self.pad + 2 * self.spec.width if mode == "none" else 0)

    def working_width(self) -> int:
        return 3 * self.spec.width

    # From ops.

    def forward(self, x: Any, run: Run, cache: Cache | None = None) -> tuple[Any, Cache | None]:
        """(y, the cache as it came)."""
        if self.spec.fused:
            gate, up = jnp.split(self.gate_up_proj.forward(x, run), 2, axis=-1)
        else:
            gate, up = self.gate_proj.forward(x, run), self.up_proj.forward(x, run)
        return self.down_proj.forward(self._ops.gated_activation(gate, up, kind=self.spec.activation), run), cache

    # Written.

    def forward_keeping(self, x: Any, run: Run, mode: str | None) -> tuple[Any, dict[str, Any]]:
        """(y ``[tokens, hidden]``, what is kept) from x, padded.

        Kept: the products with A; x, gate and up where mode is none.
        """
        groups, parts = self.groups(run.stream_pad), []
        for tile in self._tiles(x.shape[0], mode):
            merged, xa_gate_up, part = groups["gate_up"].forward(_rows(x, tile, parts), run, first=tile.start)
            pad, interpret = groups["down"].pad, platform() != "cuda"
            h = activate_merged(merged, self.spec.width, self.spec.activation, pad, interpret=interpret)
            y, xa_down, _ = groups["down"].forward(h, run, first=tile.start)
            parts.append((y, xa_gate_up, xa_down, merged, part))
        y, xa_gate_up, xa_down, merged, x = _join(parts)
        kept = {"xa": (xa_gate_up, xa_down)}
        return y, kept | {"merged": merged, "x": x} if mode == "none" else kept

    def backward(self, dy: Any, kept: dict[str, Any], run: Run, form_x: Any) -> tuple[Any, Any, dict[str, Any]]:
        groups, parts = self.groups(run.stream_pad), []
        gate_up, down = groups["gate_up"], groups["down"]
        whole = "merged" in kept
        xa_gate_up, xa_down = kept["xa"]
        x = kept["x"] if whole else form_x()
        for tile in self._tiles(dy.shape[0], "none" if whole else "full"):
            x_tile, xa = _rows(x, tile, parts), _rows(xa_gate_up, tile)
            merged = kept["merged"] if whole else gate_up.forward(x_tile, run, xa)[0]
            dh, dy_tile = down.backward_input(_rows(dy, tile), run, tile.start)
            activation, interpret = self.spec.activation, platform() != "cuda"
            dmerged, h = activate_merged_backward(merged, dh, activation, gate_up.pad, interpret=interpret)
            of_down = down.backward_adapters(h, _rows(xa_down, tile), dy_tile, run, tile.start)
            dx, dmerged = gate_up.backward_input(dmerged, run, tile.start)
            of_gate_up = gate_up.backward_adapters(x_tile, xa, dmerged, run, tile.start)
            parts.append((dx, dy_tile, of_down | of_gate_up))
        if len(parts) == 1:
            dx, dy, gradients = parts[0]
        else:
            dx = jnp.concatenate([part[0] for part in parts])
            gradients = jax.tree.map(lambda *each: sum(each), *(part[2] for part in parts))
        # Left for later, as nothing else waits for them, gradients would keep what they are made of alive.
        return barrier((dx, dy, gradients))

    def _tiles(self, tokens: int, mode: str | None) -> list[slice]:
        """Parts of the rows that are worked on one after the other; all at once where gate and up are kept."""
        count = 1 if mode == "none" else -(-tokens * 2 * self.spec.width // MLP_TILE)
        size = -(-tokens // count)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    # Few rows.

    def step(self, x: Any, cache: Cache | None, run: Run, packed: Any) -> tuple[Any, Cache | None]:
        groups = self.groups()
        gate, up = jnp.split(groups["gate_up"].step(x, packed["gate_up"], run), 2, axis=-1)
        h = self._ops.gated_activation(gate, up, kind=self.spec.activation)
        return groups["down"].step(h, packed["down"], run), cache


def _rows(x: Any, tile: slice, before: Any = None) -> Any:
    """The rows of a tile; not before those of the tile that came `before` are done, so that one is worked on at a time. x may
    be None, what a group without adapters has instead of its product with A."""
    if x is None:
        return None
    if tile.start == 0 and tile.stop == x.shape[0]:
        return x
    return barrier((x[tile], before[-1]))[0] if before else x[tile]


def _join(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *each: jnp.concatenate(each), *parts)

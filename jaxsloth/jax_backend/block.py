"""A block: branches of norm, body and norm around the residual stream, which it owns. It knows no sublayer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend.attention import Attention
from jaxsloth.jax_backend.body import Body, DefaultPair, Pair
from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.linear import GetArray, Place, barrier, pad_columns
from jaxsloth.jax_backend.mlp import Mlp
from jaxsloth.jax_backend.norm import RMSNorm
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.run import Run
from jaxsloth.models import spec as specs

BODIES: dict[type, type] = {specs.Attention: Attention, specs.Mlp: Mlp}


@dataclass(frozen=True)
class Branch:
    """One branch of a block: ``stream + scale·post_norm(body(norm(stream)))``; what is None is left out."""

    name: str
    body: Any
    norm: RMSNorm | None
    post_norm: RMSNorm | None
    scale: float
    hidden: int

    @property
    def pair(self) -> Pair:
        """The body's written pair, or the default."""
        return self.body if self.body.written_refusal() is None else DefaultPair(self.body, self.hidden)

    def forward(self, x: Any, run: Run, cache: Cache | None) -> tuple[Any, Cache | None]:
        normed = x if self.norm is None else self.norm.forward(x, run.layer)
        y, cache = self.body.forward(normed, run, cache)
        return x + self._finished(y, run), cache

    def _finished(self, y: Any, run: Run) -> Any:
        y = y if self.post_norm is None else self.post_norm.forward(y, run.layer)
        return y if self.scale == 1.0 else y * jnp.asarray(self.scale, y.dtype)

    def _normed(self, x: Any, delta: Any, run: Run, pad: int) -> tuple[Any, Any, Any]:
        """(the body's input, padded; the stream ``x + delta``; the norm's reciprocals)."""
        if self.norm is not None:
            return self.norm.forward_keeping(x, delta, pad, run.layer)
        total = x if delta is None else x + delta
        return pad_columns(total, pad), total, None

    def forward_keeping(self, x: Any, delta: Any, run: Run, mode: str | None) -> tuple[Any, Any, dict[str, Any]]:
        """(the stream before the branch, what is yet to be added to it, what is kept); the stream came as x + delta."""
        normed, x, rstd = self._normed(x, delta, run, self.pair.pad)
        y, own = self.pair.forward_keeping(normed, run, mode)
        kept = {"x": x, "body": own} | ({"rstd": rstd} if mode == "none" else {})
        if self.post_norm is not None:
            kept["y"] = y
            y, _, kept["post_rstd"] = self.post_norm.forward_keeping(y, None, 0, run.layer)
        if self.scale != 1.0:
            y = y * jnp.asarray(self.scale, y.dtype)
        return x, y, kept if mode else {}

    def backward(self, d: Any, kept: dict[str, Any], run: Run) -> tuple[Any, dict[str, Any]]:
        """(the gradient of the stream before the branch, those of what is trained); d is the stream's, padded."""
        pair, again = self.pair, []

        def form() -> Any:
            again.extend(self._normed(kept["x"], None, run, pair.pad))
            return again[0]

        dy = d if self.scale == 1.0 else d * jnp.asarray(self.scale, d.dtype)
        if self.post_norm is not None:
            dy = self.post_norm.backward(kept["y"], kept["post_rstd"], dy, None, run.layer, run.stream_pad)
        dx, written, gradients = pair.backward(dy, kept["body"], run, form)
        residual = written if dy is d else d
        if self.norm is None:
            return residual.at[:, : self.hidden].add(dx), gradients
        rstd = kept["rstd"] if "rstd" in kept else again[2]
        return self.norm.backward(kept["x"], rstd, dx, residual, run.layer), gradients

    def step(self, x: Any, delta: Any, cache: Cache | None, run: Run, packed: Any) -> tuple[Any, Any, Cache | None]:
        """As `forward` for one token a row; the stream comes and goes as x and what is yet to be added to it."""
        x = x + delta
        normed = x if self.norm is None else self.norm.forward(x, run.layer)
        y, cache = self.body.step(normed, cache, run, packed)
        return x, self._finished(y, run), cache


class Block(nnx.Module):
    """The blocks of one place in the period, their arrays stacked; norms and bodies under Hugging Face's names."""

    def __init__(self, place: Place, get: GetArray, ops: Ops) -> None:
        prefix = f"model.layers.{place.index}"

        def norm(settings: specs.Norm | None, name: str) -> None:
            if settings is not None:
                setattr(self, name, RMSNorm(settings, f"{prefix}.{name}", get, ops))

        self._hidden, self._branches = place.spec.hidden, place.spec.layers[place.index].branches
        for branch in self._branches:
            setattr(self, branch.name, BODIES[type(branch.body)](branch.body, place, branch.name, get, ops))
            norm(branch.norm, branch.norm_name)
            norm(branch.post_norm, branch.post_norm_name)

    def branches(self) -> tuple[Branch, ...]:
        return tuple(
            Branch(
                branch.name,
                getattr(self, branch.name),
                None if branch.norm is None else getattr(self, branch.norm_name),
                None if branch.post_norm is None else getattr(self, branch.post_norm_name),
                branch.scale,
                self._hidden,
            )
            for branch in self._branches
        )

    def bodies(self) -> dict[str, Body]:
        return {branch.name: branch.body for branch in self.branches()}

    def passes(self) -> dict[str, str | None]:
        """By branch: None where the written pass runs the body's own pair, else why it takes a local vjp."""
        return {name: body.written_refusal() for name, body in self.bodies().items()}

    def stream_pad(self) -> int:
        """Free columns that the bodies want behind the rows of the stream's gradient."""
        return max(branch.pair.out_pad for branch in self.branches())

    def kept_widths(self, mode: str) -> int:
        """Elements a token that the written pass keeps of a block."""
        streams = sum(1 + (branch.post_norm is not None) for branch in self.branches()) * self._hidden
        return streams + sum(branch.pair.kept_widths(mode) for branch in self.branches())

    def working_width(self) -> int:
        """About the most elements a token that it works with at a time."""
        return 8 * self._hidden + sum(branch.pair.working_width() for branch in self.branches())

    def forward(self, x: Any, run: Run, cache: Cache | None = None) -> tuple[Any, Cache | None]:
        for branch in self.branches():
            x, cache = branch.forward(x, run, cache)
        return x, cache

    def forward_keeping(self, x: Any, delta: Any, run: Run, mode: str | None) -> tuple[Any, Any, dict[str, Any]]:
        """(the stream before the last branch, that branch's output, what is kept); the stream came as x + delta, flat."""
        kept = {}
        for branch in self.branches():
            x, delta, kept[branch.name] = branch.forward_keeping(x, delta, run, mode)
        return x, delta, kept

    def backward(self, d: Any, kept: dict[str, Any], run: Run) -> tuple[Any, dict[str, Any]]:
        """(the gradient of the stream before the block, those of what is trained, by name); d is padded, that behind it."""
        gradients = {}
        for branch in reversed(self.branches()):
            d, own = branch.backward(d, kept[branch.name], run)
            gradients |= {f"{branch.name}.{name}": gradient for name, gradient in own.items()}
        return barrier((d, gradients))

    def packed(self, dtype: Any) -> dict[str, Any]:
        """What `step` takes of the adapters, for all layers of the stack: by branch and group."""
        return {
            name: {key: group.packed(dtype) for key, group in body.groups().items()} for name, body in self.bodies().items()
        }

    def step(self, x: Any, delta: Any, cache: Cache | None, run: Run, packed: Any) -> tuple[Any, Any, Cache | None]:
        for branch in self.branches():
            x, delta, cache = branch.step(x, delta, cache, run, packed[branch.name])
        return x, delta, cache

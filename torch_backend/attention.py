"""The attention sublayer: projections, norms of queries and keys, rotation, attention, output projection.

Kept by `gradient_checkpointing`: none, selective and offload keep q k v and attention's output (offload in host memory), none
also the turned q and k where those are normed first; full keeps nothing, and the block runs the body again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from jaxsloth.kernels.attention import library_ops as attention_ops
from jaxsloth.kernels.attention.library_ops import AttentionSettings
from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.linear import Linear, LinearGroup, make_linears
from jaxsloth.torch_backend.norm import RMSNorm
from jaxsloth.torch_backend.ops import Ops
from jaxsloth.torch_backend.run import Run, StepRun, padded_rows
from jaxsloth.torch_backend.weights import GetWeight

FormInput = Callable[[], tuple[torch.Tensor, bool]]


class Attention(nn.Module):
    """See `body.Body`. index: the layer's, whose cache it is."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    qkv_proj: Linear
    o_proj: Linear
    forms_again = False
    OFFLOADED = ("qkv", "attended")

    def __init__(
        self, spec: specs.Attention, name: str, index: int, linears: tuple[specs.Linear, ...], get_weight: GetWeight, ops: Ops
    ) -> None:
        super().__init__()
        self._spec, self._ops, self._index = spec, ops, index
        self.implementation = ops.attention(spec)
        self.attend = self.implementation.load()
        for part, linear in make_linears(linears, get_weight, ops).items():
            self.add_module(part, linear)
        if spec.qk_norm is not None:
            self.q_norm = RMSNorm(spec.qk_norm, f"{name}.q_norm", get_weight, ops)
            self.k_norm = RMSNorm(spec.qk_norm, f"{name}.k_norm", get_weight, ops)
        projections = [self.qkv_proj] if spec.fused_qkv else [self.q_proj, self.k_proj, self.v_proj]
        self.qkv, self.out = LinearGroup(projections), LinearGroup([self.o_proj])
        self._q_width, self._kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        kernel = import_module(self.attend.__module__) if self.implementation.name == "triton" else None
        self._settings = AttentionSettings(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.scale,
            spec.causal,
            spec.window,
            spec.soft_cap,
            self.attend,
            kernel,
        )

    def groups(self) -> Mapping[str, LinearGroup]:
        return {"qkv": self.qkv, "out": self.out}

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        spec, (batch, length) = self._spec, x.shape[:2]
        q, k, v = (t.view(batch, length, -1, spec.head_dim) for t in self._project(x, run))
        if spec.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            cos, sin = run.tables[spec.rope]
            q, k = self._ops.rope(q, cos, sin), self._ops.rope(k, cos, sin)
        offset, kv_segments = 0, run.segments if run.kv_segments is None else run.kv_segments
        if run.caches is not None and run.kv_segments is not None:
            cache = run.caches[self._index]
            offset = cache.used
            k, v = cache.append(k, v)
            kv_segments = run.kv_segments[:, : cache.used]
        out = self.attend(
            q,
            k,
            v,
            scale=spec.scale,
            causal=spec.causal,
            window=spec.window,
            soft_cap=spec.soft_cap,
            q_segments=run.segments,
            kv_segments=kv_segments,
            q_offset=offset,
        )
        return self.o_proj(out.reshape(batch, length, -1), run)

    def _project(self, x: torch.Tensor, run: Run) -> tuple[torch.Tensor, ...]:
        if self._spec.fused_qkv:
            return self.qkv_proj(x, run).split([self._q_width, self._kv_width, self._kv_width], dim=-1)
        return self.q_proj(x, run), self.k_proj(x, run), self.v_proj(x, run)

    def written_refusal(self) -> str | None:
        return self.qkv.written_refusal() or self.out.written_refusal()

    def pad(self, run: Run) -> int:
        return run.pad(self.qkv)

    def out_pad(self, run: Run) -> int:
        return run.pad(self.out)

    def kept_widths(self, mode: str) -> tuple[int, int]:
        few = 2 * self._q_width + 2 * self._kv_width
        if mode == "none" and self._spec.qk_norm is not None:
            few += self._q_width + self._kv_width
        return {"none": (few, 0), "selective": (few, 0), "offload": (0, few), "full": (0, 0)}[mode]

    def working_width(self) -> int:
        """Elements a token that the backward works with, beside what is kept."""
        return 2 * (2 * self._q_width + 2 * self._kv_width)

    def forward_keeping(
        self, x: torch.Tensor, out: torch.Tensor, run: Run, mode: str | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        assert run.layout is not None
        qkv = x.new_empty(x.shape[0], self.qkv.out_features)
        self.qkv.forward(x, qkv, run)
        q, k, reciprocals = self._turn(qkv, run)
        attended, stats = attention_ops.forward(q, k, self._split(qkv)[2], self._settings, run.layout)
        xa = self.out.forward(attended, out, run)
        if mode is None:
            return out, {}
        kept = {"qkv": qkv, "attended": attended, "stats": stats, "xa": xa, "reciprocals": reciprocals}
        if mode in ("none", "again") and reciprocals is not None:
            kept["turned"] = q, k
        return out, kept

    def backward(
        self, dy: torch.Tensor, kept: dict[str, Any], form_x: FormInput, run: Run, needs_dx: bool
    ) -> torch.Tensor | None:
        dqkv = self._backward_to_qkv(dy, kept, run)
        x, has_xa = form_x()
        dx = x.new_empty(x.shape[0], self.qkv.in_features) if needs_dx else None
        self.qkv.backward(dqkv, x, x[:, self.qkv.in_features :] if has_xa else None, dx, run)
        return dx

    def step(self, x: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], run: StepRun) -> torch.Tensor:
        spec = self._spec
        q, k, v = self._split(run.few_rows[self.qkv](x))
        if spec.qk_norm is not None:
            q, k = (
                norm(t.reshape(t.shape[0], -1, spec.head_dim)).flatten(1) for norm, t in ((self.q_norm, q), (self.k_norm, k))
            )
        tables = None if spec.rope is None else run.tables[spec.rope]
        run.attention.append(q, k, v, tables, *cache, run.slot)
        out = run.attention.attend(q, *cache, run.first, run.slot, scale=spec.scale, window=spec.window, soft_cap=spec.soft_cap)
        return run.few_rows[self.out](out)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return qkv[..., : self.qkv.out_features].split([self._q_width, self._kv_width, self._kv_width], dim=-1)

    def _tables(self, run: Run) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(cos, sin) ``[tokens, half]``."""
        if self._spec.rope is None:
            return None
        cos, sin = run.tables[self._spec.rope]
        return cos.flatten(0, 1), sin.flatten(0, 1)

    def _turn(self, qkv: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """(q and k normed and turned, the norms' reciprocals); in the memory of qkv where they are not normed."""
        (q, k, _), reciprocals, tables = self._split(qkv), None, self._tables(run)
        if self._spec.qk_norm is not None:
            (q, q_rstd), (k, k_rstd) = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
            reciprocals = q_rstd, k_rstd
        if tables is not None:
            self._ops.kernels.rope.rotate(q, k, *tables, q, k, head_dim=self._spec.head_dim)
        return q, k, reciprocals

    def _normed(self, norm: RMSNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(every head normed ``[tokens, heads·head_dim]``, the reciprocals)."""
        normed, _, rstd = norm.forward_keeping(x.reshape(-1, self._spec.head_dim), None)
        return normed.view(x.shape), rstd

    def _backward_to_qkv(self, dy: torch.Tensor, kept: dict[str, Any], run: Run) -> torch.Tensor:
        """dq, dk and dv of the projections' outputs, with pad columns behind."""
        qkv = kept.pop("qkv")
        dq, dk, dv = self._backward_to_heads(dy, qkv, kept, run)
        raw = None if self._spec.qk_norm is None else self._split(qkv)[:2]
        del qkv
        dqkv = padded_rows(dy.shape[0], self.qkv.out_features, run.pad(self.qkv), dy)
        q_out, k_out, v_out = self._split(dqkv)
        if raw is None:
            self._turn_back(dq, dk, q_out, k_out, run)
        else:
            dq, dk = dq.contiguous(), dk.contiguous()
            self._turn_back(dq, dk, dq, dk, run)
            for norm, d, x, rstd, target in zip(
                (self.q_norm, self.k_norm), (dq, dk), raw, kept.pop("reciprocals"), (q_out, k_out), strict=True
            ):
                heads = d.view(-1, self._spec.head_dim)
                norm.backward(heads, x.reshape(heads.shape), rstd, None, heads)
                target.copy_(d)
        v_out.copy_(dv)
        return dqkv

    def _turn_back(self, dq: torch.Tensor, dk: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor, run: Run) -> None:
        """Writes the gradients of q and k before the rotation; the outputs may be dq and dk."""
        tables = self._tables(run)
        if tables is not None:
            self._ops.kernels.rope.rotate(dq, dk, *tables, q_out, k_out, head_dim=self._spec.head_dim, backward=True)
        elif q_out is not dq:
            q_out.copy_(dq)
            k_out.copy_(dk)

    def _backward_to_heads(
        self, dy: torch.Tensor, qkv: torch.Tensor, kept: dict[str, Any], run: Run
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert run.layout is not None
        attended, (q, k, v) = kept.pop("attended"), self._split(qkv)
        if self._spec.qk_norm is not None:
            q, k = kept.pop("turned", None) or self._turn(qkv, run)[:2]
        dattended = torch.empty_like(attended)
        self.out.backward(dy, attended, kept.pop("xa"), dattended, run)
        return attention_ops.backward(dattended, q, k, v, attended, kept.pop("stats"), self._settings, run.layout)

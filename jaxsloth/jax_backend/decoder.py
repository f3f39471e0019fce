"""The decoder: embedding, blocks in stacks, final norm and head under Hugging Face's names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxsloth.jax_backend import autograd_pass, written_pass
from jaxsloth.jax_backend.block import Block
from jaxsloth.jax_backend.cache import Cache
from jaxsloth.jax_backend.embedding import Embedding
from jaxsloth.jax_backend.head import Head, HeadWeight
from jaxsloth.jax_backend.linear import GetArray, Place, Trained
from jaxsloth.jax_backend.norm import RMSNorm
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.plan import ProgramPlan
from jaxsloth.jax_backend.run import Run
from jaxsloth.kernels.rope.xla_ops import tables
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import check_buildable
from jaxsloth.models.names import EMBEDDING, FINAL_NORM, LM_HEAD

# A program takes the rotary settings apart: (setting, scaling) of each is compiled in, the frequencies are traced.
Ropes = tuple[tuple[specs.Rope, float], ...]


class Inner(nnx.Module):
    """What Hugging Face calls ``model``: everything but the head. layers holds one stack a place in the period."""

    def __init__(self, spec: specs.ModelSpec, get: GetArray, ops: Ops, dtype: Any) -> None:
        assert spec.norm is not None
        period = spec.layer_period()
        self.embed_tokens = Embedding(get(f"{EMBEDDING}.weight"), spec.embedding, dtype)
        self.layers = nnx.List([Block(Place(spec, index, period), get, ops) for index in range(period)])
        self.norm = RMSNorm(spec.norm, FINAL_NORM, get, ops)


class Decoder(nnx.Module):
    """A language model. get(name) hands over arrays: those of blocks stacked, under the name of the first block."""

    def __init__(self, spec: specs.ModelSpec, get: GetArray, ops: Ops, dtype: Any) -> None:
        check_buildable(spec, "JAX")
        self.spec, self.dtype, self._ops = spec, dtype, ops
        self.model = Inner(spec, get, ops, dtype)
        if not spec.head.tied:
            self.lm_head = HeadWeight(get(f"{LM_HEAD}.weight"))

    def head(self) -> Head:
        owner = self.model.embed_tokens if self.spec.head.tied else self.lm_head
        weight = owner.weight[...].astype(self.dtype)
        return Head(weight, isinstance(owner.weight, Trained), self.spec.head.soft_cap, self._ops)

    def rope_tables(self, positions: Any, ropes: Ropes, frequencies: Any) -> tuple[tuple[Any, Any], ...]:
        """(cos, sin) of every rotary setting."""
        return tuple(tables(positions, values, scaling) for (_, scaling), values in zip(ropes, frequencies, strict=True))

    def run(self, positions: Any, segments: Any, ropes: Ropes, frequencies: Any, **more: Any) -> Run:
        """What the blocks of a pass share; more: other fields of `Run`."""
        found = self.rope_tables(positions, ropes, frequencies)
        return Run(tuple(rope for rope, _ in ropes), found, segments, **more)

    @property
    def _count(self) -> int:
        return len(self.spec.layers) // len(self.model.layers)

    def hidden(self, input_ids: Any, run: Run, caches: Any = None, noise: Any = None, mode: str = "none") -> tuple[Any, Any]:
        """(final hidden states ``[batch, length, hidden]``, normed; the caches with this pass written, stacked as before)."""
        x = self.model.embed_tokens.forward(input_ids, noise)
        x, caches = autograd_pass.stream(self.model.layers, x, run, self._count, caches, mode)
        return self.model.norm.forward(x), caches

    def stream_pad(self) -> int:
        """Free columns behind the rows of the stream's gradient, as wide in every block."""
        return max(block.stream_pad() for block in self.model.layers)

    def written_hidden(self, input_ids: Any, run: Run, plan: ProgramPlan, noise: Any = None) -> Any:
        """Final hidden states ``[tokens, hidden]``, normed, through the written pass that `plan` describes."""
        x = self.model.embed_tokens.forward(input_ids.reshape(-1), noise)
        run = replace(run, unpacked=plan.unpacked, stream_pad=self.stream_pad())
        trains = isinstance(self.model.embed_tokens.weight, Trained)
        x = written_pass.stream(self.model.layers, x, run, self._count, plan.kept.mode, plan.unrolled, trains)
        return self.model.norm.forward(x)

    def loss(
        self,
        input_ids: Any,
        run: Run,
        targets: Any,
        plan: ProgramPlan,
        noise: Any = None,
        per_token: bool = False,
        label_smoothing: float = 0.0,
    ) -> Any:
        """The cross-entropy over all targets of a batch, summed or every position's ``[rows, length]``."""
        if plan.kept.written:
            hidden = self.written_hidden(input_ids, run, plan, noise)
        else:
            hidden = self.hidden(input_ids, run, noise=noise, mode=plan.kept.mode)[0].reshape(-1, self.spec.hidden)
        return self.head().loss(hidden, targets, plan.max_targets, per_token, label_smoothing)

    def empty_caches(self, batch: int, capacity: int) -> tuple[Cache, ...]:
        """One stack of caches a place in the period, ``[layers, batch, capacity, kv_heads, head_dim]``."""
        found = []
        for place in range(len(self.model.layers)):
            attention = self.spec.layers[place].attention
            shape = (self._count, batch, capacity, attention.kv_heads, attention.head_dim)
            found.append(Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)))
        return tuple(found)

"""The decoder: embedding, blocks scanned over their stack, final norm, and the head with its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsloth.batch import IGNORE
from jaxsloth.jax_backend import fused
from jaxsloth.jax_backend.layers import TRAINED, Block, Cache, Context, Frozen, Ops, Place, RMSNorm, Take, Trained
from jaxsloth.jax_backend.plan import Plan
from jaxsloth.kernels.attention.jax_library_ops import Documents
from jaxsloth.kernels.jax_platform import precision_of
from jaxsloth.kernels.rope.xla_ops import tables
from jaxsloth.models import spec as specs
from jaxsloth.models.buildable import check_buildable
from jaxsloth.models.names import EMBEDDING, FINAL_NORM, LM_HEAD

Frequencies = Mapping[specs.Rope, tuple[Any, float]]


class Embedding(nnx.Module):
    """The token table, frozen in the compute dtype, or trained in float32."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight if isinstance(weight, Trained) else Frozen(weight)


class Inner(nnx.Module):
    """What Hugging Face calls ``model``: everything but the head. layers holds one stack a place in the period."""

    def __init__(self, spec: specs.ModelSpec, take: Take, ops: Ops) -> None:
        assert spec.norm is not None
        period = spec.layer_period()
        self.embed_tokens = Embedding(take(f"{EMBEDDING}.weight"))
        self.layers = nnx.List([Block(Place(spec, index, period), take, ops) for index in range(period)])
        self.norm = RMSNorm(spec.norm, FINAL_NORM, take, ops)


class Decoder(nnx.Module):
    """A language model. take(name) hands over arrays: those of blocks stacked, under the name of the first block."""

    def __init__(self, spec: specs.ModelSpec, take: Take, ops: Ops, dtype: Any, recompute: bool) -> None:
        check_buildable(spec, "JAX")
        self.spec, self.dtype, self._ops, self._recompute = spec, dtype, ops, recompute
        self.model = Inner(spec, take, ops)
        if not spec.head.tied:
            self.lm_head = Embedding(take(f"{LM_HEAD}.weight"))

    def head_weight(self) -> tuple[Any, bool]:
        """(``[vocab, hidden]`` in the compute dtype, whether it is trained)."""
        owner = self.model.embed_tokens if self.spec.head.tied else self.lm_head
        return owner.weight[...].astype(self.dtype), isinstance(owner.weight, Trained)

    def rope_tables(self, positions: Any, frequencies: Frequencies) -> dict[specs.Rope, tuple[Any, Any]]:
        return {rope: tables(positions, values, scaling) for rope, (values, scaling) in frequencies.items()}

    def hidden(self, input_ids: Any, context: Context, caches: Any = None) -> tuple[Any, Any]:
        """(final hidden states ``[batch, length, hidden]``, normed; the caches with this pass written, stacked as before)."""
        x = self.model.embed_tokens.weight[...][input_ids].astype(self.dtype)
        if self.spec.embedding.scale != 1.0:
            x = x * jnp.asarray(self.spec.embedding.scale, self.dtype)
        if context.noise is not None:
            x = x + context.noise.astype(self.dtype)
        structure, trained, frozen = nnx.split(self.model.layers, TRAINED, ...)

        def period(x: Any, scanned: Any) -> tuple[Any, Any]:
            layer, adapters, stacks = scanned
            written = []
            for place, block in enumerate(nnx.merge(structure, adapters, frozen)):
                x, cache = block(x, context, layer, None if stacks is None else stacks[place])
                written.append(cache)
            return x, None if stacks is None else tuple(written)

        count = len(self.spec.layers) // len(self.model.layers)
        body = jax.checkpoint(period) if self._recompute and caches is None else period
        x, caches = jax.lax.scan(body, x, (jnp.arange(count, dtype=jnp.int32), trained, caches))
        return self.model.norm(x), caches

    def logits(self, hidden: Any) -> Any:
        """float32 ``[..., vocab]``."""
        weight, _ = self.head_weight()
        logits = jnp.einsum(
            "...h,vh->...v", hidden, weight, precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32
        )
        cap = self.spec.head.soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def loss(
        self,
        input_ids: Any,
        context: Context,
        targets: Any,
        plan: Plan,
        documents: Documents | None = None,
        per_token: bool = False,
        label_smoothing: float = 0.0,
    ) -> Any:
        """The cross-entropy over all targets of a batch of which `plan` is true, summed or every position's ``[rows, length]``.

        documents: those it is packed of.
        """
        if plan.mode is None:
            hidden = self.hidden(input_ids, context)[0].reshape(-1, self.spec.hidden)
        else:
            hidden = fused.hidden(self, input_ids, context, plan.mode, documents, plan.plain, plan.unrolled)
        weight, trained = self.head_weight()
        shape, targets, tokens = targets.shape, targets.reshape(-1), hidden.shape[0]
        chosen = None
        if plan.chosen < tokens:
            chosen = jnp.nonzero(targets != IGNORE, size=plan.chosen, fill_value=tokens)[0]
            hidden = hidden.at[chosen].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
            targets = targets.at[chosen].get(mode="fill", fill_value=IGNORE)
        cap = self.spec.head.soft_cap
        loss = self._ops.linear_cross_entropy(
            hidden,
            weight,
            targets,
            soft_cap=cap,
            per_token=per_token,
            label_smoothing=label_smoothing,
            train_weight=trained,
        )
        if not per_token:
            return loss
        return (loss if chosen is None else jnp.zeros(tokens).at[chosen].set(loss, mode="drop")).reshape(shape)

    def empty_caches(self, batch: int, capacity: int) -> tuple[Cache, ...]:
        """One stack of caches a place in the period, ``[layers, batch, capacity, kv_heads, head_dim]``."""
        period = len(self.model.layers)
        found = []
        for place in range(period):
            attention = self.spec.layers[place].attention
            shape = (len(self.spec.layers) // period, batch, capacity, attention.kv_heads, attention.head_dim)
            found.append(Cache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)))
        return tuple(found)

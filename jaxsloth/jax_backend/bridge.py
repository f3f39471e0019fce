"""What a torch module over this backend calls: compiled passes that are pure in the adapters and the batch.

Arrays cross by DLPack, so nothing here knows of torch. What an adapter is made of selects the program; its values, its scaling
(folded into B by the caller), the batch and the dropout key are traced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.backend import Output, PassOptions, Pullback, Tokens
from jaxsloth.jax_backend.layers import Context
from jaxsloth.jax_backend.plan import Plan
from jaxsloth.jax_backend.train_step import rates_of
from jaxsloth.jax_backend.weights import stacked_name
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.models.spec import Lora

if TYPE_CHECKING:
    from jaxsloth.jax_backend.model import JaxModel

SHORTEST = 64  # rows are padded to at least this many tokens


class Bridge:
    """See `jaxsloth.backend.Bridge`. One group of adapters is one stack: a kind of layer over all blocks that share it."""

    def __init__(self, model: JaxModel) -> None:
        self._model = model
        self._programs: dict[Any, tuple[Any, Any, Any]] = {}
        self.device = platform()

    def groups(self, modules: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
        spec = self._model.spec
        period = spec.layer_period()
        found: dict[str, list[str | None]] = {}
        for module in modules:
            key, place = stacked_name(module, period)
            found.setdefault(key, [None] * (len(spec.layers) // period))[place] = module
        return {key: tuple(members) for key, members in found.items()}

    def padded_length(self, length: int) -> int:
        """Steps of a sixteenth to an eighth of the length, at least 32: few programs, little padding."""
        if length <= SHORTEST:
            return SHORTEST
        step = max(1 << (length.bit_length() - 4), SHORTEST // 2)
        return -(-length // step) * step

    def head_weight(self) -> Any:
        # On several devices it is whole on each: torch is given the first one's.
        return self._model.decoder().head_weight()[0].addressable_data(0)

    def fingerprint(self) -> bytes:
        leaves = jax.tree.leaves(self._model.frozen)
        sums = [np.asarray(_checksum(leaf)).tobytes() for leaf in leaves]
        return hashlib.sha256(b"".join(sums)).digest()

    def run(self, output: Output, adapters: Mapping[str, tuple[Any, Any]], batch: Tokens, options: PassOptions) -> Any:
        return _forward(*self._arguments(adapters, batch, options), **self._choices(output, adapters, batch, options))

    def differentiate(
        self, output: Output, adapters: Mapping[str, tuple[Any, Any]], batch: Tokens, options: PassOptions
    ) -> tuple[Any, Pullback]:
        arguments, choices = self._arguments(adapters, batch, options), self._choices(output, adapters, batch, options)
        if output == "loss":
            loss, gradients = _loss_and_gradients(*arguments, **choices)
            return loss, lambda cotangent: _by_group(_scaled(gradients, _take(cotangent)))
        value, residuals = _with_residuals(*arguments, **choices)
        return value, lambda cotangent: _by_group(_pull(residuals, arguments[1], _take(cotangent)))

    def _program(self, adapters: Mapping[str, tuple[Any, Any]], options: PassOptions) -> tuple[Any, Any, Any]:
        """(structure, state with hollow adapters, frozen state) of the decoder that has exactly these adapters."""
        if jax.device_count() > 1:
            raise ValueError(
                f"a torch module over JAX runs on one device, and JAX sees {jax.device_count()}; show it one "
                "(CUDA_VISIBLE_DEVICES=0), or train with jaxsloth's own trainers, which use them all"
            )
        key = (tuple(sorted(adapters)), options.dropout, options.recompute)
        if key not in self._programs:
            spec, modules = self._model.spec, tuple(adapters)
            # The rank is that of the arrays, and the scaling is folded into B.
            lora = Lora(0, 1.0, 1.0, options.dropout, modules) if modules else None
            hollow = {f"{module}.{part}": jnp.zeros(()) for module in modules for part in ("lora_A", "lora_B")}
            self._programs[key] = self._model.split(replace(spec, lora=lora), hollow, options.recompute)
        return self._programs[key]

    def _arguments(self, adapters: Mapping[str, tuple[Any, Any]], batch: Tokens, options: PassOptions) -> tuple[Any, ...]:
        _, hollow, frozen = self._program(adapters, options)
        flat = []
        for path, leaf in nnx.to_flat_state(hollow):
            module, _, part = ".".join(map(str, path)).rpartition(".")
            flat.append((path, leaf.replace(_take(adapters[module][part == "lora_B"]))))
        arrays = {
            "input_ids": _take(batch.input_ids),
            "segments": _take(batch.segments),
            "kv_segments": _take(batch.kv_segments),
            "positions": _take(batch.positions),
            "rows": np.arange(batch.input_ids.shape[0], dtype=np.int32),
            "targets": None if batch.targets is None else _take(batch.targets),
            "words": None if batch.dropout_words is None else np.array(batch.dropout_words, np.uint32),
            "first": np.int32(options.first),
        }
        frequencies, _ = self._model.frequencies(batch.longest)
        return nnx.from_flat_state(flat), frozen, frequencies, arrays

    def _choices(
        self, output: Output, adapters: Mapping[str, tuple[Any, Any]], batch: Tokens, options: PassOptions
    ) -> dict[str, Any]:
        """What is compiled in."""
        self._model.count_compilation(f"{output} of {len(adapters)} groups", tuple(batch.input_ids.shape))
        _, ropes = self._model.frequencies(batch.longest)
        return {
            "structure": self._program(adapters, options)[0],
            "ropes": ropes,
            "output": output,
            "count": options.count,
        }


_COMPILED_IN = ("structure", "ropes", "output", "count")


def _evaluate(
    trained: Any, frozen: Any, frequencies: Any, batch: Any, *, structure: Any, ropes: Any, output: Output, count: int | None
) -> Any:
    decoder = nnx.merge(structure, trained, frozen)
    tables = decoder.rope_tables(batch["positions"], rates_of(ropes, frequencies))
    context = Context(tables, batch["segments"], batch["kv_segments"], rows=batch["rows"], dropout_words=batch["words"])
    if output == "loss":
        # The composed blocks: the fused ones are planned from arrays on the host.
        return decoder.loss(batch["input_ids"], context, batch["targets"], Plan(None, batch["input_ids"].size, plain=False))
    hidden, _ = decoder.hidden(batch["input_ids"], context)
    if count is not None:
        hidden = jax.lax.dynamic_slice_in_dim(hidden, batch["first"], count, axis=1)
    return decoder.logits(hidden) if output == "logits" else hidden


_forward = partial(jax.jit, static_argnames=_COMPILED_IN)(_evaluate)


@partial(jax.jit, static_argnames=_COMPILED_IN)
def _loss_and_gradients(trained: Any, frozen: Any, frequencies: Any, batch: Any, **choices: Any) -> Any:
    return jax.value_and_grad(partial(_evaluate, **choices))(trained, frozen, frequencies, batch)


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["structure", "places"])
@dataclass(frozen=True)
class _Residuals:
    """A vjp taken apart. places: for each of its leaves the frozen weight that it is, or None where it is the next of `kept`.

    What a compiled function returns is new memory: were the weights among it, every pass would copy the model.
    """

    kept: list[Any]
    structure: Any
    places: tuple[int | None, ...]


@partial(jax.jit, static_argnames=_COMPILED_IN)
def _with_residuals(trained: Any, frozen: Any, frequencies: Any, batch: Any, **choices: Any) -> tuple[Any, _Residuals]:
    """(the output, what its backward needs, which stays on the device until then)."""
    value, vjp = jax.vjp(lambda trained: _evaluate(trained, frozen, frequencies, batch, **choices), trained)
    leaves, structure = jax.tree.flatten(vjp)
    weights = {id(weight): place for place, weight in enumerate(jax.tree.leaves(frozen))}
    places = tuple(weights.get(id(leaf)) for leaf in leaves)
    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return value, _Residuals(kept, structure, places)


@jax.jit
def _pull(residuals: _Residuals, frozen: Any, cotangent: Any) -> Any:
    weights, kept = jax.tree.leaves(frozen), iter(residuals.kept)
    leaves = [next(kept) if place is None else weights[place] for place in residuals.places]
    return jax.tree.unflatten(residuals.structure, leaves)(cotangent)[0]


@jax.jit
def _scaled(gradients: Any, factor: Any) -> Any:
    return jax.tree.map(lambda gradient: gradient * factor, gradients)


@jax.jit
def _checksum(array: Any) -> Any:
    flat = array.reshape(-1).astype(jnp.float32)
    return jnp.stack([flat.sum(), jnp.abs(flat).sum(), (flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32))).sum()])


def _by_group(gradients: Any) -> dict[str, tuple[Any, Any]]:
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    modules = [name.removesuffix(".lora_A") for name in flat if name.endswith(".lora_A")]
    return {module: (flat[f"{module}.lora_A"], flat[f"{module}.lora_B"]) for module in modules}


def _take(array: Any) -> Any:
    """An array of another framework as JAX's, on JAX's device; no copy where it lies there already."""
    return jax.device_put(jax.dlpack.from_dlpack(array), jax.devices()[0])

"""What a torch module over this backend calls: compiled passes that are pure in the adapters and the batch.

Arrays cross by DLPack, so nothing here knows of torch. What an adapter is made of selects the program; its values, its scaling
(folded into B by the caller), the batch and the dropout key are traced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.backend import CheckpointingName
from jaxsloth.batch import Batch
from jaxsloth.functional_model import Output, PassOptions, Pullback, Tokens, Weights
from jaxsloth.jax_backend import devices
from jaxsloth.jax_backend.linear import Trained
from jaxsloth.jax_backend.plan import Checkpointing, ProgramPlan, documents_from, make_plan
from jaxsloth.jax_backend.run import DropoutKey
from jaxsloth.jax_backend.state import ModelState
from jaxsloth.models.names import EMBEDDING, stacked_name
from jaxsloth.models.spec import Lora, ModelSpec

SHORTEST = 64  # rows are padded to at least this many tokens


class FunctionalModel:
    """See the protocol. One group of adapters is one stack: a kind of layer over all blocks that share it."""

    def __init__(self, model: ModelState) -> None:
        self._model = model
        self._programs: dict[Any, _Program] = {}
        self._groups: dict[tuple[str, ...], dict[str, tuple[str | None, ...]]] = {}
        self.device = devices.torch_device()

    def groups(self, modules: Sequence[str]) -> Mapping[str, tuple[str | None, ...]]:
        asked = tuple(modules)
        if asked not in self._groups:
            spec, found = self._model.spec, {}
            period = spec.layer_period()
            for module in modules:
                key, place = stacked_name(module, period)
                found.setdefault(key, [None] * (len(spec.layers) // period))[place] = module
            self._groups[asked] = {key: tuple(members) for key, members in found.items()}
        return self._groups[asked]

    def padded_length(self, length: int) -> int:
        """Steps of a sixteenth to an eighth of the length, at least 32: few programs, little padding."""
        if length <= SHORTEST:
            return SHORTEST
        step = max(1 << (length.bit_length() - 4), SHORTEST // 2)
        return -(-length // step) * step

    def base_weight(self, module: str) -> Any:
        # On several devices it is whole on each: torch is given the first one's.
        name = EMBEDDING if self._model.spec.head.tied else module
        return self._model.base_array(f"{name}.weight").addressable_data(0)

    def fingerprint(self) -> bytes:
        leaves = jax.tree.leaves(self._model.frozen)
        sums = [np.asarray(_checksum(leaf)).tobytes() for leaf in leaves]
        return hashlib.sha256(b"".join(sums)).digest()

    def run(self, output: Output, weights: Weights, batch: Tokens, options: PassOptions) -> Any:
        arguments, choices = self._prepare(output, weights, batch, options, learns=False)
        with self._model.compiles():
            return _once_read(weights, _forward(*arguments, **choices))

    def differentiate(self, output: Output, weights: Weights, batch: Tokens, options: PassOptions) -> tuple[Any, Pullback]:
        arguments, choices = self._prepare(output, weights, batch, options, learns=True)
        if output == "loss":
            with self._model.compiles():
                loss, gradients = _once_read(weights, _loss_and_gradients(*arguments, **choices))
            return loss, lambda cotangent: self._by_name(_scaled(gradients, _take(cotangent)), weights)
        with self._model.compiles():
            value, residuals = _once_read(weights, _with_residuals(*arguments, **choices))

        def pull(cotangent: Any) -> Weights:
            return self._by_name(_once_read(weights, _pull(residuals, arguments[1], _take(cotangent))), weights)

        return value, pull

    def _biases(self, weights: Weights) -> dict[str, tuple[str | None, ...]]:
        """The stacks of biases that the weights stand in: a stack's name -> the tensors in it, None for the base's own."""
        layers = [name.removesuffix(".bias") for name in weights if name.endswith(".bias")]
        return {
            f"{key}.bias": tuple(layer and f"{layer}.bias" for layer in members) for key, members in self.groups(layers).items()
        }

    def _by_name(self, gradients: Any, weights: Weights) -> Weights:
        flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
        modules = [name.removesuffix(".lora_A") for name in flat if name.endswith(".lora_A")]
        found: dict[str, tuple[Any, ...]] = {m: (flat[f"{m}.lora_A"], flat[f"{m}.lora_B"]) for m in modules}
        found |= {name: (flat[name],) for name in flat if name.endswith(".weight")}
        for key, members in self._biases(weights).items():
            rows = zip(members, jnp.unstack(flat[key]), strict=True)
            found |= {name: (row,) for name, row in rows if name is not None}
        return found

    def _program(self, weights: Weights, options: PassOptions) -> _Program:
        """The decoder that has exactly these adapters, and these tensors trained whole."""
        if self._model.devices > 1:
            raise ValueError(
                f"a torch module over JAX runs on one device, and JAX has {self._model.devices}; name one "
                "(device_map='cuda:0'), or train with jaxsloth's own trainers, which use them all"
            )
        adapters = {module: pair for module, pair in weights.items() if len(pair) == 2}
        whole, biases = [name for name in weights if name.endswith(".weight")], self._biases(weights)
        rank = max((a.shape[1] for a, _ in adapters.values()), default=0)
        key = (tuple(sorted(weights)), rank, options.dropout)
        if key not in self._programs:
            saved = tuple(name.removesuffix(".weight") for name in whole)
            # The scaling is folded into B.
            bias = "all" if biases else "none"
            lora = Lora(rank, 1.0, 1.0, options.dropout, tuple(adapters), modules_to_save=saved, bias=bias)
            spec = replace(self._model.spec, lora=lora)
            empty: dict[str, Any] = {f"{m}.{part}": jnp.zeros(()) for m in adapters for part in ("lora_A", "lora_B")}
            empty |= {name: Trained(jnp.zeros(())) for name in (*whole, *biases)}
            self._programs[key] = _Program(spec, *self._model.split(spec, empty))
        return self._programs[key]

    def _prepare(
        self, output: Output, weights: Weights, batch: Tokens, options: PassOptions, learns: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(what is traced, what is compiled in)."""
        program, biases = self._program(weights, options), self._biases(weights)
        flat = []
        for path, leaf in nnx.to_flat_state(program.empty):
            name = ".".join(map(str, path))
            module, _, part = name.rpartition(".")
            if name in biases:
                own = self._model.base_array(name)  # the other blocks' stay
                rows = [own[i] if n is None else _take(weights[n][0]) for i, n in enumerate(biases[name])]
                value = jnp.stack([row.astype(jnp.float32) for row in rows])
            else:
                value = _take(weights[name][0] if name in weights else weights[module][part == "lora_B"])
            flat.append((path, leaf.replace(value)))
        plan, documents, rows = self._plan(output, program, batch, options.checkpointing if learns else "none")
        arrays = {
            "input_ids": batch.input_ids,
            "segments": batch.segments if rows is None else rows.segments,
            "kv_segments": batch.kv_segments if rows is None else rows.segments,
            "positions": batch.positions,
            "rows": np.arange(batch.input_ids.shape[0], dtype=np.int32),
            "targets": batch.targets if output == "loss" else None,
            "rng_key": None if batch.rng_key is None else np.array(batch.rng_key, np.uint32),
            "first": np.int32(options.first),
            "documents": documents,
        }
        frequencies, ropes = self._model.frequencies(batch.longest)
        choices = {"structure": program.structure, "ropes": ropes, "output": output, "count": options.count, "plan": plan}
        return (nnx.from_flat_state(flat), program.frozen, frequencies, arrays), choices

    def _plan(
        self, output: Output, program: _Program, batch: Tokens, checkpointing: CheckpointingName
    ) -> tuple[ProgramPlan, tuple[np.ndarray, ...], Batch | None]:
        """(the plan, the arrays of a packed batch's documents, the batch as the fused blocks see it, None for the others)."""
        rows, tokens = batch.as_batch(), batch.input_ids.size
        if (checkpointing, tokens) not in program.modes:
            blocks = nnx.merge(program.structure, program.empty, program.frozen).model.layers
            program.modes[checkpointing, tokens] = self._model.resolve(program.spec, blocks, checkpointing, tokens)
        kept = program.modes[checkpointing, tokens]
        if kept.mode == "offload" and output != "loss":
            kept = replace(kept, mode="full")  # what one program leaves to another lies on the device
        if rows is None or not kept.written:
            return ProgramPlan(replace(kept, written=False), tokens, unpacked=False), (), None
        plan, documents = make_plan(lambda _: kept, self._model.unrolled, rows.targets[None], rows.segments[None], 1)
        return plan, tuple(array[0] for array in documents), rows


@dataclass(frozen=True)
class _Program:
    """A decoder with adapters taken apart: structure, the adapters' state without values, the frozen state. modes: what is kept
    by the checkpointing asked for and the tokens of a batch."""

    spec: ModelSpec
    structure: Any
    empty: Any
    frozen: Any
    modes: dict[tuple[CheckpointingName, int], Checkpointing] = field(default_factory=dict)


_COMPILED_IN = ("structure", "ropes", "output", "count", "plan")


def _evaluate(
    trained: Any,
    frozen: Any,
    frequencies: Any,
    batch: Any,
    *,
    structure: Any,
    ropes: Any,
    output: Output,
    count: int | None,
    plan: ProgramPlan,
) -> Any:
    decoder = nnx.merge(structure, trained, frozen)
    dropout = None if batch["rng_key"] is None else DropoutKey(batch["rng_key"], batch["rows"])
    more = {"kv_segments": batch["kv_segments"], "dropout": dropout, "documents": documents_from(batch["documents"])}
    run = decoder.run(batch["positions"], batch["segments"], ropes, frequencies, **more)
    ids = batch["input_ids"]
    if output == "loss":
        return decoder.loss(ids, run, batch["targets"], plan)
    if plan.kept.written:
        hidden = decoder.written_hidden(ids, run, plan).reshape(*ids.shape, -1)
    else:
        hidden, _ = decoder.hidden(ids, run, mode=plan.kept.mode)
    if count is not None:
        hidden = jax.lax.dynamic_slice_in_dim(hidden, batch["first"], count, axis=1)
    return decoder.head().forward(hidden) if output == "logits" else hidden


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


def _once_read(weights: Weights, result: Any) -> Any:
    """`result`, when nothing still reads a tensor that is trained whole: it is its owner's memory, who may write it next."""
    if any(len(own) == 1 for own in weights.values()):
        jax.block_until_ready(result)
    return result


def _take(array: Any) -> Any:
    """An array of another framework as JAX's, on JAX's device; no copy where it lies there already."""
    return jax.device_put(jax.dlpack.from_dlpack(array), devices.in_use()[0])

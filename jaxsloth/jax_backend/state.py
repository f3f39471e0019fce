"""What steps, passes and decoding share of a built model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsloth.backend import BuildOptions, TensorSource
from jaxsloth.convert.peft_adapter import check_values
from jaxsloth.jax_backend import devices
from jaxsloth.jax_backend.block import Block
from jaxsloth.jax_backend.compilations import Compilations
from jaxsloth.jax_backend.decoder import Decoder
from jaxsloth.jax_backend.linear import TRAINED, DenseWeight, Nf4Weight, Trained, as_weight
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.plan import Checkpointing
from jaxsloth.jax_backend.weights import load_weights
from jaxsloth.jax_backend.written_pass import describe
from jaxsloth.kernels.jax_platform import platform
from jaxsloth.kernels.nf4.xla_ops import NF4
from jaxsloth.kernels.registry import RefusedError, Target, check_requested, choose_named, choose_written
from jaxsloth.models.buildable import decode_refusal
from jaxsloth.models.memory import FILLED, first_fitting
from jaxsloth.models.names import own_name, stacked_name, tensor_shapes, trainable_shapes
from jaxsloth.models.rope import inverse_frequencies
from jaxsloth.models.spec import ModelSpec, Rope
from jaxsloth.options import CheckpointingName

logger = logging.getLogger("jaxsloth.jax_backend")

# Fetching from the host overlaps little in XLA's schedule: recomputing is faster (docs/performance.md).
AUTO_ORDER = ("none", "selective", "full", "offload")
_ADAPTERS = ("lora_A", "lora_B")


def training_passes(spec: ModelSpec, options: BuildOptions) -> list[str]:
    """See `jaxsloth.backend.Backend`; the module is traced, so that its arrays are shapes alone."""
    ops = make_ops(spec, options)
    period, dtype = spec.layer_period(), jnp.dtype(options.dtype)
    count, shapes = len(spec.layers) // period, {}
    trained = {own_name(name): shape for name, shape in trainable_shapes(spec).items()}
    for name, shape in (tensor_shapes(spec) | trained).items():
        own = name.removesuffix(".weight") if name.rpartition(".")[0].rpartition(".")[2] in _ADAPTERS else name
        shapes[stacked_name(own, period)[0]] = (count, *shape) if own.startswith("model.layers.") else shape
    found: list[str] = []

    def build() -> None:
        decoder = Decoder(spec, lambda name: jnp.zeros(shapes[name], dtype), ops, dtype)
        found.extend(describe(decoder.model.layers, count))

    jax.eval_shape(build)
    return found


def make_ops(spec: ModelSpec, options: BuildOptions) -> Ops:
    """The ops of a model; RefusedError where the options ask for what is not here."""
    if options.compute != "exact":
        raise RefusedError(f"compute {options.compute} runs on the torch backend so far; take it, or compute exact")
    check_requested(options.implementations or {})
    return Ops(Target(platform(), options.dtype, {"hidden": spec.hidden}), options.implementations or {})


class ModelState:
    """The module apart as nnx's structure, and the state of what is trained and frozen."""

    def __init__(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> None:
        self.spec, self.options = spec, options
        self._ops = make_ops(spec, options)
        self._dtype = jnp.dtype(options.dtype)
        self._weights = load_weights(spec, source, self._dtype)
        self._frequencies: dict[Any, Any] = {}
        self._compilations = Compilations()
        self._kept: tuple[ModelSpec, CheckpointingName, int, Checkpointing] | None = None
        self._assemble({})

    def _assemble(self, trained: Mapping[str, Any]) -> None:
        """Makes the module of the base weights and of what is trained, and splits it."""
        self.structure, self.trained, self.frozen = self.split(self.spec, trained)
        self._places = _places(self.spec)

    def split(self, spec: ModelSpec, trained: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """The module of the base weights and `spec`'s adapters: (structure, state of what is trained, frozen state)."""
        arrays = {**self._weights, **trained}
        decoder = Decoder(spec, arrays.__getitem__, self._ops, self._dtype)
        structure, state, frozen = nnx.split(decoder, TRAINED, ...)
        return structure, devices.replicate(state), devices.replicate(frozen)

    def decoder(self) -> Decoder:
        return nnx.merge(self.structure, self.trained, self.frozen)

    def add_adapters(self, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> None:
        if spec.lora is None or replace(spec, lora=None) != replace(self.spec, lora=None):
            raise ValueError("add_adapters takes this model's own spec with adapters added (jaxsloth.transforms.add_lora)")
        check_values(values, trainable_shapes(spec), "the adapter")
        stacked = self._stack_values(values)
        self.spec = spec
        whole = {key: Trained(value) for key, value in stacked.items() if key.rpartition(".")[2] not in _ADAPTERS}
        self._assemble({**stacked, **whole})

    def _stack_values(self, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Values by PEFT name -> arrays by the module's own names, stacked; blocks without an adapter get zeros."""
        period = self.spec.layer_period()
        count = len(self.spec.layers) // period
        found: dict[str, np.ndarray] = {}
        places: dict[str, int] = {}
        for name, value in values.items():
            own = own_name(name)
            if own.rpartition(".")[0].rpartition(".")[2] in _ADAPTERS:
                own = own.removesuffix(".weight")
            key, place = stacked_name(own, period)
            if not own.startswith("model.layers."):
                found[key] = np.asarray(value, _dtype_of(value))
                continue
            stack = found.setdefault(key, np.zeros((count, *value.shape), _dtype_of(value)))
            stack[place] = value
            places[key] = places.get(key, 0) + 1
        for key, filled in places.items():
            if key.rpartition(".")[2] not in _ADAPTERS and filled != count:
                raise ValueError(
                    f"biases of {key} are trained in {filled} of {count} stacked blocks; train all or none of them"
                )
        return {key: devices.put(value) for key, value in found.items()}

    def stack(self, values: Mapping[str, np.ndarray]) -> Any:
        """Values by PEFT name as a state like that of the trained variables."""
        stacked = self._stack_values(values)
        flat = [(path, leaf.replace(stacked[_path_name(path)])) for path, leaf in nnx.to_flat_state(self.trained)]
        return devices.replicate(nnx.from_flat_state(flat))

    def unstack(self, state: Any) -> dict[str, np.ndarray]:
        """A state like that of the trained variables as arrays by PEFT name, in `trainable_shapes`' order."""
        arrays = {_path_name(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}
        return {name: np.array(arrays[key] if at is None else arrays[key][at]) for name, (key, at) in self._places.items()}

    def trainable(self) -> dict[str, np.ndarray]:
        return self.unstack(self.trained)

    def trained_arrays(self) -> dict[str, tuple[Any, int | None]]:
        flat = nnx.to_flat_state(self.trained)
        arrays = {_path_name(path): leaf[...].addressable_data(0) for path, leaf in flat}
        return {name: (arrays[key], place) for name, (key, place) in self._places.items()}

    def load_trainable(self, values: Mapping[str, np.ndarray]) -> None:
        check_values(values, trainable_shapes(self.spec), "the adapter")
        self.trained = self.stack(values)

    def base_tensor(self, name: str) -> np.ndarray:
        return np.asarray(self._one(name).dense(jnp.float32))

    def quantized_tensor(self, name: str) -> NF4:
        weight = self._one(name)
        if not isinstance(weight, Nf4Weight):
            raise ValueError(f"{name} is not quantized")
        return jax.tree.map(np.asarray, weight.array)

    def _one(self, name: str) -> DenseWeight | Nf4Weight:
        if name not in tensor_shapes(self.spec):
            raise ValueError(f"the model has no tensor {name}")
        key, place = stacked_name(name, self.spec.layer_period())
        weight = as_weight(self._weights[key])
        return weight.at(place) if name.startswith("model.layers.") else weight

    def base_array(self, name: str) -> Any:
        """A base weight as it lies on the device, stacked in the blocks, whatever is trained in its place."""
        return self._weights[name]

    def frequencies(self, length: int) -> tuple[tuple[Any, ...], tuple[tuple[Rope, float], ...]]:
        """The rotary frequencies for sequences of `length`: (arrays, (setting, scaling) of each), a program's two kinds of
        arguments."""
        ropes = dict.fromkeys(layer.attention.rope for layer in self.spec.layers if layer.attention.rope is not None)
        key = length if self.stretches else None
        if key not in self._frequencies:
            arrays, settings = [], []
            for rope in ropes:
                values, scaling = inverse_frequencies(rope, max_positions=self.spec.max_positions, length=length)
                arrays.append(jnp.array(values, jnp.float32))
                settings.append((rope, scaling))
            self._frequencies[key] = tuple(arrays), tuple(settings)
        return self._frequencies[key]

    @property
    def stretches(self) -> bool:
        """Whether rotary frequencies change with the length."""
        scalings = (layer.attention.rope.scaling for layer in self.spec.layers if layer.attention.rope is not None)
        return any(scaling is not None and scaling.kind in ("dynamic", "longrope") for scaling in scalings)

    @property
    def devices(self) -> int:
        return len(devices.in_use())

    def checkpointing(self, tokens: int, learns: bool = True) -> Checkpointing:
        """Which pass runs and what it keeps.

        tokens: those of a device's micro-batch, which "auto" asks the memory for; for fewer, the earlier choice stays. learns:
        False for an evaluation, which takes the current choice and does not change it.

        Raises:
            RefusedError: a pass was asked for by name and can't run, or it can't keep what was asked for.
        """
        spec, wanted, known = self.spec, self.options.gradient_checkpointing, self._kept
        if known is None or known[0] is not spec or known[1] != wanted or (learns and known[2] < tokens):
            blocks = self.decoder().model.layers
            kept = self.resolve(spec, blocks, wanted, tokens)
            if kept.written and (known is None or known[0] is not spec):
                for kind in describe(blocks, len(spec.layers) // len(blocks)):
                    logger.info("training pass, %s", kind)
            known = self._kept = spec, wanted, tokens if learns else 0, kept
        return known[3]

    def resolve(self, spec: ModelSpec, blocks: Sequence[Block], wanted: CheckpointingName, tokens: int) -> Checkpointing:
        """As `checkpointing`, for this model with the adapters of `spec`, which are those of the blocks."""
        requested = (self.options.implementations or {}).get("train_pass")
        reason = "has no adapters to train" if spec.lora is None else None
        written = choose_written("train_pass", "jax", requested, reason, platform())
        free = devices.free_memory()
        if wanted == "auto" and written:
            return Checkpointing(True, first_fitting(self.needs(blocks, tokens), free))
        if wanted == "auto":  # JAX keeps about twice what the written pass does
            fits = 2 * self.needs(blocks, tokens)["none"] <= free * FILLED
            return Checkpointing(False, "none" if fits else "full")
        if wanted == "offload" and not written and platform() != "cpu":
            raise RefusedError(
                "gradient_checkpointing offload is a way of the written training pass, and autograd was asked for; "
                "take full, or leave implementations.train_pass out"
            )
        return Checkpointing(written, wanted)

    def needs(self, blocks: Sequence[Block], tokens: int) -> dict[str, float]:
        """Bytes on the device that the written pass's activations take by mode, the fastest first: those kept, and about the
        most that a block works with."""
        count = len(self.spec.layers) // len(blocks)
        working = max(block.working_width() for block in blocks)

        def kept(mode: str) -> int:
            return 0 if mode == "offload" else count * sum(block.kept_widths(mode) for block in blocks)

        return {mode: float(tokens * self._dtype.itemsize * (kept(mode) + working)) for mode in AUTO_ORDER}

    def unrolled(self, mode: str) -> bool:
        """Whether the written pass unrolls its layers instead of scanning them; implementations={"layer_loop": …} decides.

        By itself a mode that keeps much is unrolled, which copies nothing of it into stacks, and one that saves memory scans.

        Raises:
            RefusedError: another name than scan or unrolled came.
        """
        keeps_much = platform() == "cuda" and mode in ("none", "selective")
        requested = (self.options.implementations or {}).get("layer_loop", "unrolled" if keeps_much else "scan")
        return choose_named("layer_loop", "jax", requested, {"scan": None, "unrolled": None}) == "unrolled"

    def decodes_fused(self, fits_twice: bool) -> bool:
        """Whether greedy bursts run jax_backend/decode_pass.py; implementations={"decode_step": …} decides.

        fits_twice: whether the caches can lie there twice.

        Raises:
            RefusedError: "fused" was asked for and can't run this model, or another name came.
        """
        requested = (self.options.implementations or {}).get("decode_step")
        reason = decode_refusal(self.spec)
        if not fits_twice:
            reason = "has its caches twice for a moment, and there is no room for that"
        return choose_written("decode_step", "jax", requested, reason, platform())

    def compiles(self) -> AbstractContextManager[None]:
        """What is compiled meanwhile counts as this model's."""
        return self._compilations.counting()

    def compilations(self) -> int:
        """How many programs were compiled for this model's steps, evaluations, passes and decoding."""
        return self._compilations.count

    def set_gradient_checkpointing(self, name: CheckpointingName) -> None:
        self.options = replace(self.options, gradient_checkpointing=name)
        if self.spec.lora is None:
            self._assemble({})
        else:
            self.add_adapters(self.spec, self.trainable())


def _places(spec: ModelSpec) -> dict[str, tuple[str, int | None]]:
    """Where what is trained stands, by PEFT name: (the module's own name, the place in its stack, where it is one)."""
    period, found = spec.layer_period(), dict[str, tuple[str, int | None]]()
    for name in trainable_shapes(spec):
        own = own_name(name)
        if own.rpartition(".")[0].rpartition(".")[2] in _ADAPTERS:
            own = own.removesuffix(".weight")
        key, place = stacked_name(own, period)
        found[name] = key, place if own.startswith("model.layers.") else None
    return found


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def _dtype_of(value: np.ndarray) -> Any:
    """float32, but codes stay codes."""
    return np.uint8 if value.dtype == np.uint8 else np.float32

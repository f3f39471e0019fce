"""The work that every contender is given: shape, tokens, adapters and optimizer, and what the arithmetic alone would take."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from benchmarks.shapes import shape_spec
from jaxsloth.backend import DtypeName
from jaxsloth.models.names import layer_linears, linears, lora_names
from jaxsloth.models.spec import ModelSpec
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora, quantize

PEAK_FLOPS = 780e12  # dense bf16 on one H200: what an 8192³ product reached (777 to 798)
FIRST_TOKEN = 8  # below it are the checkpoint's special tokens, whose rows a peer may zero


@dataclass(frozen=True)
class Work:
    """One contender's task. checkpointing and options are the contender's own words; the rest is the same for all of a row."""

    shape: str = "tiny"
    batch: int = 2
    length: int = 64
    quantization: Literal["nf4", "none"] = "nf4"
    dtype: DtypeName = "bfloat16"
    checkpointing: str = "none"
    options: dict[str, str] = field(default_factory=dict)  # further fields of jaxsloth's BuildOptions
    lora: bool = True
    r: int = 16
    alpha: int = 16
    learning_rate: float = 1e-4
    warmup: int = 3
    steps: int = 8
    documents: int = 0  # over 0: whole epochs over so many documents of at most `length` tokens (jaxsloth only)
    packing: bool = False  # documents side by side in rows of `length`, not one a row
    memory_limit: int | None = None  # bytes of the device that the process may use

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def of(self, checkpointing: str, options: dict[str, str]) -> Work:
        return replace(self, checkpointing=checkpointing, options=options)

    def at_length(self, length: int) -> Work:
        return replace(self, length=length)

    def within(self, shape: str, memory_limit: int) -> Work:
        return replace(self, shape=shape, memory_limit=memory_limit)


class Runner(Protocol):
    """What a contender's ``build(folder, work)`` returns: a loaded model with its optimizer."""

    framework: Literal["torch", "jax"]

    def step(self, ids: np.ndarray) -> float:
        """One optimizer step on int32 ids ``[batch, length]``, labels = inputs; returns when the device has finished."""
        ...

    def gradients(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Of the only step so far, by PEFT name, float32; empty where the contender has none."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes: the training's where the framework can tell it from the loading's (torch), else the process'."""
        ...


def specs(work: Work) -> tuple[ModelSpec, ModelSpec]:
    """(base, base with adapters). NF4 has nested absmax, Unsloth's default."""
    base = shape_spec(work.shape)
    if work.quantization == "nf4":
        base = quantize(base, nested=True)
    return base, add_lora(base, r=work.r, alpha=float(work.alpha))


def adapters(work: Work) -> dict[str, np.ndarray]:
    """A as a run starts it; B ~ N(0, 0.01²) instead of zero, for with a zero B the gradients of A would be zero."""
    _, spec = specs(work)
    values = initial_adapters(spec, "kaiming", 0, lambda name: np.zeros(0))
    for name, value in values.items():
        if ".lora_B." in name:
            generator = np.random.Generator(np.random.Philox(key=[1, zlib.crc32(name.encode())]))
            values[name] = generator.normal(0.0, 0.01, value.shape).astype(np.float32)
    return values


def tokens(work: Work) -> np.ndarray:
    """int32 ``[batch, length]``, the same for every contender."""
    generator = np.random.Generator(np.random.Philox(1))
    vocab = shape_spec(work.shape).embedding.vocab
    return generator.integers(FIRST_TOKEN, vocab, (work.batch, work.length), dtype=np.int32)


def documents(work: Work) -> list[np.ndarray]:
    """`work.documents` token arrays whose lengths are spread like an instruction data set's: log-normal, 180 on average."""
    generator = np.random.Generator(np.random.Philox(2))
    lengths = np.clip(generator.lognormal(np.log(180.0) - 0.32, 0.8, work.documents).astype(int), 8, work.length)
    vocab = shape_spec(work.shape).embedding.vocab
    return [generator.integers(FIRST_TOKEN, vocab, length, dtype=np.int32) for length in lengths]


def compared_names(work: Work) -> list[str]:
    """The adapter tensors of the first, middle and last layer: those whose gradients are compared."""
    _, spec = specs(work)
    count = len(spec.layers)
    prefixes = tuple(f"model.layers.{index}." for index in sorted({0, count // 2, count - 1}))
    return [name for linear in linears(spec) if linear.name.startswith(prefixes) for name in lora_names(linear.name)]


def counted_flops(work: Work) -> dict[str, float]:
    """`training_flops` of a training row's work."""
    return training_flops(specs(work)[1], work.batch, work.length)


def training_flops(spec: ModelSpec, batch: int, length: int, *, trains_head: bool = False) -> dict[str, float]:
    """Multiply-adds times two of one step that must run ("step"), and of recomputing every layer's forward ("recompute").

    Frozen products take a forward and an input gradient, adapters and a trained head a weight gradient too; causal attention
    half its square, and its backward 2.5 times its forward (five products to two). Layers before the first adapter, and an
    adapter's input gradient into them, take the forward alone.
    """
    assert spec.lora is not None
    positions, adapted = batch * length, set(spec.lora.modules)
    step = forward = 0.0
    trains = False
    for index, block in enumerate(spec.layers):
        own = layer_linears(spec, index)
        trains = trains or any(linear.name in adapted for linear in own)
        frozen = 2.0 * positions * sum(linear.in_features * linear.out_features for linear in own)
        sizes = sum(linear.in_features + linear.out_features for linear in own if linear.name in adapted)
        adapter = 2.0 * positions * spec.lora.r * sizes
        attention = 2.0 * positions * length * block.attention.heads * block.attention.head_dim
        forward += frozen + adapter + attention
        step += 2 * frozen + 3 * adapter + 3.5 * attention if trains else frozen + attention
    head = 2.0 * positions * spec.embedding.vocab * spec.hidden
    return {"step": step + (3 if trains_head else 2) * head, "recompute": forward}


def weight_bytes(work: Work) -> int:
    """Bytes of the frozen weights that one decoded token reads: layers and head."""
    _, spec = specs(work)
    frozen = sum(linear.in_features * linear.out_features for linear in linears(spec))
    return int(frozen * _bytes_a_weight(work)) + 2 * spec.embedding.vocab * spec.hidden


def layer_bytes(work: Work) -> int:
    """Bytes that one layer of `shape` keeps on the device: frozen weights, and of its adapters the float32 weights, gradients
    and both moments."""
    _, spec = specs(work)
    layer = [linear for linear in linears(spec) if linear.name.startswith("model.layers.0.")]
    frozen = sum(linear.in_features * linear.out_features for linear in layer)
    adapter = sum(work.r * (linear.in_features + linear.out_features) for linear in layer)
    return int(frozen * _bytes_a_weight(work)) + 16 * adapter


def _bytes_a_weight(work: Work) -> float:
    """Nested NF4: a nibble, a byte of absmax a block of 64, its float32 absmax every 256 blocks."""
    return 0.5 + 1 / 64 + 4 / (64 * 256) if work.quantization == "nf4" else 2.0

"""What a checkpoint stores against what its config says: names, tied heads, tensors left over, dtypes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxsloth.backend import TensorSource
from jaxsloth.convert.bnb4bit_source import dequantized
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.kernels.nf4.contract import NF4
from jaxsloth.models.names import EMBEDDING, LM_HEAD, linears
from jaxsloth.models.spec import ModelSpec, Quantization

logger = logging.getLogger("jaxsloth.convert")

_HEAD, _TABLE = f"{LM_HEAD}.weight", f"{EMBEDDING}.weight"
_WEIGHTS = ("F64", "F32", "F16", "BF16", "NF4", "INT8", "FP8")
# What transformers once stored beside the weights and computes from config.json.
_COMPUTED = re.compile(r"(?:.*\.)?rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)")
_SHOWN = 20


class CheckpointSource(TensorSource, Protocol):
    """A TensorSource over files. stored_as: the dtype in safetensors' words, "NF4", "INT8" (bitsandbytes) or "FP8" (scaled)."""

    def file_of(self, name: str) -> Path: ...

    def stored_as(self, name: str) -> str: ...


class _Renamed:
    """A source under other names; those that are left out of `names` are not there. What is NF4 and is no layer of a block (a
    head) is read dequantized, as it is computed with."""

    def __init__(self, source: CheckpointSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def names(self) -> Sequence[str]:
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def read(self, name: str) -> Any:
        value = self._source.read(self._names[name])
        return dequantized(value) if isinstance(value, NF4) and name in (_HEAD, _TABLE) else value

    def file_of(self, name: str) -> Path:
        return self._source.file_of(self._names[name])

    def stored_as(self, name: str) -> str:
        return self._source.stored_as(self._names[name])


def fitted(config: dict[str, Any], source: CheckpointSource, path: Path) -> tuple[dict[str, Any], CheckpointSource]:
    """The checkpoint as transformers reads it: names without ``model.`` get it, and of a head and an embedding that config.json
    ties, one alone is both, two that are equal are one, and two that differ are not tied."""
    present = set(source.names())
    names = {f"model.{name}" if _lacks_prefix(name, present) else name: name for name in source.names()}
    if config.get("tie_word_embeddings") is True and _HEAD in names:
        if _TABLE not in names:
            names[_TABLE] = names.pop(_HEAD)
        elif _equal(source, names[_HEAD], names[_TABLE]):
            del names[_HEAD]
        else:
            logger.warning(
                "%s: config.json ties the head to the embedding, but a head of its own is stored, which is used; set "
                "tie_word_embeddings to false there",
                path,
            )
            config = config | {"tie_word_embeddings": False}
    return config, _Renamed(source, names)


def _lacks_prefix(name: str, present: set[str]) -> bool:
    return name.partition(".")[0] in ("embed_tokens", "layers", "norm") and f"model.{name}" not in present


def _equal(source: CheckpointSource, one: str, other: str) -> bool:
    if source.shape(one) != source.shape(other):
        return False
    a, b = source.read(one), source.read(other)
    if isinstance(a, NF4) or isinstance(b, NF4):
        return False
    return all(np.array_equal(a[start : start + 4096], b[start : start + 4096]) for start in range(0, len(a), 4096))


def stored_quantization(source: CheckpointSource, spec: ModelSpec) -> Quantization | None:
    """Which layers of the blocks are stored in NF4: bitsandbytes leaves those in llm_int8_skip_modules as they are."""
    modules = tuple(linear.name for linear in linears(spec) if source.stored_as(f"{linear.name}.weight") == "NF4")
    return Quantization(nested=True, modules=modules) if modules else None


def check_tensors(source: CheckpointSource, expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """That a checkpoint has every tensor that a model needs, with the right shape and of a dtype of weights, and no other,
    before anything is read.

    Raises:
        CheckpointError: names the tensors that are missing or left over, or the first of another shape or dtype, with its file.
    """
    present = set(source.names())
    missing = [name for name in expected if name not in present]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(f"{path}: the checkpoint lacks {', '.join(missing[:_SHOWN])}{more}")
    left = sorted(name for name in present if name not in expected and not _COMPUTED.fullmatch(name))
    if left:
        more = f", … ({len(left)} in all)" if len(left) > _SHOWN else ""
        raise CheckpointError(
            f"{path}: the model that config.json describes has no place for {len(left)} of the checkpoint's tensors, and would "
            f"compute without them: {', '.join(left[:_SHOWN])}{more}; mend config.json (the number of layers, biases, the "
            "architecture), or remove them"
        )
    for name, shape in expected.items():
        found = tuple(source.shape(name))
        if found != shape:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name} must have the shape {shape} by config.json, got {found}"
            )
        if source.stored_as(name) not in _WEIGHTS:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name} must be stored as floating-point numbers (F64, F32, F16, BF16), got "
                f"{source.stored_as(name)}"
            )


_AT_ONCE = 1 << 22  # values that are looked at together
Clamped = dict[str, int]  # of values that were too large and became the largest: how many, by tensor
_counting = Lock()


def check_cast(name: str, tensor: np.ndarray, dtype: Any, clamped: Clamped | None = None) -> np.ndarray:
    """The tensor in `dtype`, itself where it is so already; `cast_error` where finite values do not stay so, unless `clamped`
    is given: then they become the largest that there is, and are counted in it.

    Beyond the result it takes a few temporaries of a slice.
    """
    if tensor.dtype == dtype:
        return tensor
    cast = np.empty(tensor.shape, dtype)
    rows, into = np.atleast_1d(tensor), np.atleast_1d(cast)
    step, count, first = max(1, _AT_ONCE // max(1, math.prod(rows.shape[1:]))), 0, 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        with np.errstate(over="ignore"):
            into[start : start + step] = part
        lost = np.isfinite(part) & ~np.isfinite(into[start : start + step])
        if lost.any():
            first = first if count else float(part[lost][0])
            count += int(lost.sum())
            largest = float(ml_dtypes.finfo(dtype).max)
            into[start : start + step][lost] = np.where(part[lost] > 0, largest, -largest)
    if count:
        _refuse_or_count(name, count, first, np.dtype(dtype).name, clamped)
    return cast


def clamp_rows(name: str, rows: np.ndarray, largest: float, what: str, clamped: Clamped | None) -> np.ndarray:
    """float32 rows that lie within ±largest, which `what` (in words) holds; as `check_cast` where they do not."""
    lost = np.abs(rows) > largest
    _refuse_or_count(name, int(lost.sum()), float(rows[lost][0]), what, clamped)
    return np.clip(rows, -largest, largest)


def _refuse_or_count(name: str, count: int, first: float, what: str, clamped: Clamped | None) -> None:
    if clamped is None:
        raise cast_error(name, count, first, what)
    with _counting:  # blocks are formed on all cores
        clamped[name] = clamped.get(name, 0) + count


def tell_clamped(clamped: Clamped) -> None:
    """Says how many values are others than the source's."""
    if clamped:
        shown = ", ".join(f"{name} ({count})" for name, count in list(clamped.items())[:_SHOWN])
        more = f", … ({len(clamped)} tensors)" if len(clamped) > _SHOWN else ""
        total = sum(clamped.values())
        logger.warning("%d of the values were too large and became the largest there is, by tensor: %s%s", total, shown, more)


def not_numbers(name: str, kind: str) -> ValueError:
    """What a weight is refused with whose NaN or infinite values `kind`'s blocks can't hold."""
    return CheckpointError(
        f"tensor {name} holds NaN or infinite values, which {kind} can't; the checkpoint is damaged (--to hf keeps it as it is)"
    )


def cast_error(name: str, count: int, value: float, dtype: str) -> ValueError:
    """What a weight is refused with that `dtype` can't hold."""
    return CheckpointError(
        f"tensor {name} holds {count} value{'s' if count > 1 else ''} too large for {dtype} (the first is {value:g}): they "
        "would become infinite; take bfloat16 or float32, or write the largest number in their place (jaxsloth convert "
        "--allow-overflow)"
    )

"""Converting checkpoints from one format to another, tensor by tensor: what ``jaxsloth convert`` calls."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from jaxsloth.backend import DtypeName
from jaxsloth.convert.adapters import base_of_adapter, note_on_base, read_fitted, read_merging
from jaxsloth.convert.bnb4bit_source import dequantized
from jaxsloth.convert.bnb4bit_writer import bnb4bit_bytes, bnb4bit_config, bnb4bit_parts
from jaxsloth.convert.bnb8bit import bnb8bit_bytes, bnb8bit_config, bnb8bit_parts
from jaxsloth.convert.checkpoint import Checkpoint, find_checkpoint, resolve_path
from jaxsloth.convert.files import check_replaced, check_room, check_target, whole_folder, write_whole
from jaxsloth.convert.fitting import Clamped, check_cast, not_numbers, tell_clamped
from jaxsloth.convert.gguf_adapter import adapter_bytes, check_gguf_adapter, write_gguf_adapter
from jaxsloth.convert.gguf_fields import model_fields, rope_factors
from jaxsloth.convert.gguf_fields import notes_on as notes_on_gguf
from jaxsloth.convert.gguf_source import GgufSource
from jaxsloth.convert.gguf_tokenizer import template_field, tokenizer_fields
from jaxsloth.convert.gguf_types import OUT_TYPES, check_available
from jaxsloth.convert.gguf_writer import plan_tensors, write_gguf
from jaxsloth.convert.jax_layouts import LAYOUTS, leaves, notes_on
from jaxsloth.convert.merge import MAGNITUDE, is_trained, merged
from jaxsloth.convert.orbax_source import write_model
from jaxsloth.convert.peft_adapter import check_values, write_adapter
from jaxsloth.convert.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from jaxsloth.extras import require
from jaxsloth.kernels.nf4.contract import NF4
from jaxsloth.models.names import linears, tensor_shapes, trainable_shapes
from jaxsloth.models.spec import ModelSpec

Format = Literal["hf", "bnb-4bit", "bnb-8bit", "gguf", "peft", "gguf-lora", "orbax", "maxtext", "tunix"]
_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STORED: dict[str, DtypeName] = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of the quantized folders: how layers are stored, in how many bytes, and what config.json says.
_QUANTIZED: dict[str, tuple[str, Callable[[tuple[int, ...]], int], Callable[[DtypeName], dict[str, Any]]]] = {
    "bnb-4bit": ("NF4", bnb4bit_bytes, bnb4bit_config),
    "bnb-8bit": ("INT8", bnb8bit_bytes, bnb8bit_config),
}
ADAPTERS = ("peft", "gguf-lora")
_PARTS = 6  # tensors that a quantized weight is stored as, at most
# What a model folder holds beside config.json and weights, and conversions keep as it is.
KEPT_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Planned:
    """A tensor as it will be written: Hugging Face name, shape, how it is stored, and its bytes there."""

    name: str
    shape: tuple[int, ...]
    stored_as: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What a conversion will write, known before its first byte. notes: what a user should know of it."""

    checkpoint: Checkpoint
    spec: ModelSpec
    adapter: Mapping[str, np.ndarray]
    destination: Path
    to: Format
    dtype: DtypeName
    tensors: tuple[Planned, ...]
    notes: tuple[str, ...]
    options: Options

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Options:
    """merge: the folder of a PEFT adapter that is added to the weights first. dtype: of what is stored in 16 or 32 bits; None
    keeps the checkpoint's. outtype: of GGUF files, a name of `gguf_types.OUT_TYPES`. kept: a folder whose files (tokenizer,
    generation settings) are written in the place of the checkpoint's. base: of adapters, the model that they belong to.
    allow_overflow: values too large for what they are stored as become the largest there is, and are counted, not refused."""

    merge: Path | None = None
    dtype: DtypeName | None = None
    outtype: str = "f16"
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False
    kept: Path | None = None
    base: str | None = None
    allow_overflow: bool = False


def plan(source: str, destination: Path, to: Format, options: Options = Options()) -> Plan:
    """Reads headers and settings, and says what `convert` would write.

    Args:
        source: a folder, a .gguf file, package:NAME/file, or a Hugging Face name; for "peft" and "gguf-lora" an adapter's.
        destination: a folder that is not there yet; of "gguf" and "gguf-lora" a file.

    Raises:
        ValueError: the format, the dtype or the outtype is unknown, or a package for it is missing.
        CheckpointError: the source can't be read, or holds tensors that the model has not.
        ExistsError: the destination is there and overwriting was not asked for.
    """
    _check_wanted(destination, to, options)
    if to in ADAPTERS:
        return _plan_adapter(source, destination, to, options)
    checkpoint = find_checkpoint(source, to_convert=True)
    check_replaced(destination, _read_files(checkpoint, options.merge))
    spec, adapter = checkpoint.spec(), {}
    if options.merge is not None:
        spec, adapter = read_merging(options.merge, spec)
    found = plan_opened(checkpoint, spec, adapter, destination, to, options)
    note = None if options.merge is None else note_on_base(options.merge, source)
    return found if note is None else replace(found, notes=(*found.notes, note))


def plan_opened(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    adapter: Mapping[str, np.ndarray],
    destination: Path,
    to: Format,
    options: Options = Options(),
) -> Plan:
    """`plan` of an opened checkpoint and an adapter's values, which are merged: every name of `trainable_shapes(spec)` (and
    DoRA's magnitudes), or none."""
    _check_wanted(destination, to, options)
    plain = {name: value for name, value in adapter.items() if not name.endswith(MAGNITUDE)}
    check_values(plain, trainable_shapes(spec), "the adapter to merge")
    notes = []
    if adapter and checkpoint.kind in ("bnb-4bit", "bnb-8bit", "fp8", "gguf"):
        notes.append("the adapter is merged into the dequantized base; a 16-bit base, where there is one, is the better source")
    dtype = options.dtype or _stored_dtype(checkpoint)
    tensors = list(_planned(spec, checkpoint, to, dtype, options, notes))
    if checkpoint.kind == "orbax" and to not in LAYOUTS:  # read as they lie: an array may hold the tensors of all layers
        places = {name: place for place, name in enumerate(checkpoint.source.names())}
        tensors.sort(key=lambda tensor: places[tensor.name])
    return Plan(checkpoint, spec, adapter, destination, to, dtype, tuple(tensors), tuple(notes), options)


def _read_files(checkpoint: Checkpoint, adapter: str | Path | None) -> list[Path]:
    """Of what may be overwritten no part may be."""
    source = checkpoint.source
    files = {source.file_of(name) for name in source.names()} | {checkpoint.described_by}
    return sorted(files) + ([] if adapter is None else [resolve_path(str(adapter))])


def _plan_adapter(source: str, destination: Path, to: Format, options: Options) -> Plan:
    """`plan` of an adapter's conversion; the plan's checkpoint is its base, of which nothing is written."""
    if options.merge is not None:
        raise ValueError(f"an adapter is not merged where one is written (--to {to}); leave --merge out")
    base = base_of_adapter(source, options.base)
    checkpoint = find_checkpoint(base, to_convert=True)
    check_replaced(destination, _read_files(checkpoint, source))
    spec, adapter = read_fitted(source, checkpoint.spec())
    outtype = options.outtype if to == "gguf-lora" else "f32"
    if to == "gguf-lora":
        check_gguf_adapter(spec, outtype)
    tensors = tuple(
        Planned(name, shape, outtype.upper(), adapter_bytes(shape, outtype)) for name, shape in trainable_shapes(spec).items()
    )
    return Plan(checkpoint, spec, adapter, destination, to, "float32", tensors, (), options)


def _check_wanted(destination: Path, to: Format, options: Options) -> None:
    if to == "run-state":
        raise ValueError(
            "--to run-state takes the orbax tree of a run's checkpoint, with adapter_config.json, and the source is none: "
            "a model has no optimizer's state; begin a run from it (FastLanguageModel.from_pretrained takes what it is)"
        )
    if to not in get_args(Format):
        raise ValueError(f"the format must be one of {', '.join(get_args(Format))}; got {to!r}")
    if options.dtype not in (None, *get_args(DtypeName)):
        raise ValueError(f"dtype must be one of {', '.join(get_args(DtypeName))}; got {options.dtype!r}")
    if options.outtype not in OUT_TYPES:
        raise ValueError(f"outtype must be one of {', '.join(OUT_TYPES)}; got {options.outtype!r}")
    if to == "gguf":
        check_available(OUT_TYPES[options.outtype])
    if to in LAYOUTS:
        require("orbax", f"writing {to}", ValueError)
    check_target(destination, folder=to not in ("gguf", "gguf-lora"), overwrite=options.overwrite)
    if to in ("gguf", "gguf-lora") and destination.suffix != ".gguf":
        raise ValueError(f"the file's name must end in .gguf, by which it is known; got {destination.name}")


def convert(plan: Plan, on_written: Callable[[int], None] = lambda count: None) -> Path:
    """Carries a plan out; the destination appears whole or not at all. on_written is told the bytes of each tensor.

    Raises:
        WriteError: there is too little room on the disk, told before the first byte; or it stopped taking what is written.
        CheckpointError: a tensor is damaged, or a value is too large for the dtype.
    """
    check_room(plan.destination, plan.nbytes)
    clamped: Clamped | None = {} if plan.options.allow_overflow else None
    if plan.to in ADAPTERS:
        _write_adapter(plan, clamped)
        on_written(plan.nbytes)
    elif plan.to == "gguf":
        with write_whole(plan.destination, overwrite=plan.options.overwrite) as temporary:
            for count in _write_gguf(plan, temporary, clamped):
                on_written(count)
    else:
        _write_folder(plan, on_written, clamped)
    tell_clamped(clamped or {})
    return plan.destination


def _write_folder(plan: Plan, on_written: Callable[[int], None], clamped: Clamped | None) -> None:
    with whole_folder(plan.destination, overwrite=plan.options.overwrite) as temporary:
        if plan.to in LAYOUTS:
            _write_tree(plan, temporary, on_written, clamped)
        else:
            _write_safetensors(plan, temporary, on_written, clamped)
        config = {
            key: value for key, value in plan.checkpoint.config.items() if key not in ("quantization_config", "torch_dtype")
        }
        if plan.to in _QUANTIZED:
            config["quantization_config"] = _QUANTIZED[plan.to][2](plan.dtype)
        _write_json(temporary / "config.json", config | {"dtype": plan.dtype})
        _keep_files(plan, temporary)


def _write_adapter(plan: Plan, clamped: Clamped | None) -> None:
    if plan.to == "peft":
        write_adapter(plan.destination, plan.spec, plan.adapter, plan.checkpoint.name, overwrite=plan.options.overwrite)
        return
    with write_whole(plan.destination, overwrite=plan.options.overwrite) as temporary:
        write_gguf_adapter(temporary, plan.spec, plan.adapter, plan.options.outtype, plan.destination.stem, clamped)


def _write_safetensors(plan: Plan, folder: Path, on_written: Callable[[int], None], clamped: Clamped | None) -> None:
    names = [tensor.name for tensor in plan.tensors]
    with SafetensorsWriter(folder, names, plan.options.shard_bytes, _PARTS if plan.to in _QUANTIZED else 1) as writer:
        for tensor, value in zip(plan.tensors, _values(plan), strict=True):
            writer.add(*_stored(plan, tensor, value, clamped))
            on_written(tensor.nbytes)


def _write_tree(plan: Plan, folder: Path, on_written: Callable[[int], None], clamped: Clamped | None) -> None:
    assert plan.to in LAYOUTS
    tensors = {tensor.name: tensor for tensor in plan.tensors}

    def read(name: str) -> np.ndarray:
        return np.asarray(_value(plan, tensors[name]))

    def told(name: str) -> None:
        on_written(tensors[name].nbytes)

    write_model(folder, plan.spec, plan.to, plan.dtype, read, told, plan.options.shard_bytes, clamped)


def _planned(
    spec: ModelSpec, checkpoint: Checkpoint, to: Format, dtype: DtypeName, options: Options, notes: list[str]
) -> Iterator[Planned]:
    if to == "gguf":
        kind, fallbacks = OUT_TYPES[options.outtype], []
        notes.extend(notes_on_gguf(spec))
        for tensor in plan_tensors(spec, kind):
            yield Planned(tensor.hf_name, tensor.shape, tensor.kind, tensor.nbytes)
            if tensor.kind != "F32" and tensor.kind != kind.tensor_type("", 0, 1, 1) and tensor.shape[-1] % 256:
                fallbacks.append(tensor.name)
        if fallbacks and kind.needs_libgguf:
            notes.append(
                f"{len(fallbacks)} tensors have rows that 256 does not divide and are stored in other blocks, as llama.cpp does"
            )
        return
    if to in LAYOUTS:
        shapes = tensor_shapes(spec)
        notes.extend(notes_on(spec, to, dtype))
        for leaf in leaves(spec, to, dtype):
            for part in leaf.parts:
                size = leaf.values // len(leaf.parts) * np.dtype(_DTYPES[leaf.dtype]).itemsize
                yield Planned(part.name, shapes[part.name], leaf.dtype, size)
        return
    quantized = {f"{linear.name}.weight" for linear in linears(spec)} if to in _QUANTIZED else set()
    for name, shape in tensor_shapes(spec).items():
        count = int(np.prod(shape))
        if name in quantized:
            kind, nbytes, _ = _QUANTIZED[to]
            yield Planned(name, shape, kind, nbytes(shape))
        else:
            yield Planned(name, shape, dtype, count * np.dtype(_DTYPES[dtype]).itemsize)


def _values(plan: Plan) -> Iterator[np.ndarray | NF4]:
    return (_value(plan, tensor) for tensor in plan.tensors)


def _value(plan: Plan, tensor: Planned) -> np.ndarray | NF4:
    """A tensor's value, merged; NF4 where it stays as the checkpoint has it."""
    value, trained = plan.checkpoint.source.read(tensor.name), is_trained(tensor.name, plan.adapter)
    if isinstance(value, NF4):
        if tensor.stored_as == "NF4" and not trained:
            return value
        value = dequantized(value)
    return merged(tensor.name, value, plan.spec, plan.adapter) if trained else value


def _stored(plan: Plan, tensor: Planned, value: np.ndarray | NF4, clamped: Clamped | None) -> list[tuple[str, np.ndarray]]:
    if tensor.stored_as == "NF4":
        nf4 = value if isinstance(value, NF4) else _quantize(value)
        if nf4.nested is not None and not np.isfinite(float(nf4.nested.offset)):  # the mean of the blocks' maxima
            raise not_numbers(tensor.name, "NF4")
        return list(bnb4bit_parts(tensor.name, nf4, plan.dtype).items())
    assert isinstance(value, np.ndarray)
    if tensor.stored_as == "INT8":
        return list(bnb8bit_parts(tensor.name, value, clamped).items())
    return [(tensor.name, check_cast(tensor.name, value, _DTYPES[tensor.stored_as], clamped))]


def _quantize(weight: np.ndarray) -> NF4:
    """Nested NF4, by whichever framework is here: both give bitsandbytes' codes."""
    from importlib.util import find_spec

    if find_spec("torch") is not None:
        import torch

        from jaxsloth.kernels.nf4.torch_ops import quantize

        own = np.array(weight, order="C")
        if own.dtype == ml_dtypes.bfloat16:  # which torch does not take from numpy
            return quantize(torch.from_numpy(own.view(np.uint16)).view(torch.bfloat16), nested=True)
        return quantize(torch.from_numpy(own), nested=True)
    import jax.numpy as jnp

    from jaxsloth.kernels.nf4.xla_ops import quantize

    return quantize(jnp.asarray(weight), nested=True)


def _write_gguf(plan: Plan, file: Path, clamped: Clamped | None) -> Iterator[int]:
    spec, checkpoint, kind = plan.spec, plan.checkpoint, OUT_TYPES[plan.options.outtype]
    fields = model_fields(spec, Path(checkpoint.name).stem, kind)
    if isinstance(checkpoint.source, GgufSource):
        fields |= checkpoint.source.tokenizer_fields()
        if plan.options.kept is not None:
            fields |= template_field(plan.options.kept)
    else:
        ids = {"bos": spec.bos_id, "eos": next(iter(spec.eos_ids), None), "padding": spec.pad_id}
        fields |= tokenizer_fields(plan.options.kept or checkpoint.path, spec.embedding.vocab, ids)
    values = ((tensor.name, np.asarray(value)) for tensor, value in zip(plan.tensors, _values(plan), strict=True))
    stored = {tensor.hf_name: tensor for tensor in plan_tensors(spec, kind)}
    ordered = [stored[tensor.name] for tensor in plan.tensors]
    return write_gguf(file, ordered, fields, values, spec, rope_factors(spec), clamped)


def _keep_files(plan: Plan, folder: Path) -> None:
    """Tokenizer, chat template and generation settings: copied, or what transformers makes of a GGUF file's."""
    checkpoint = plan.checkpoint
    if plan.options.kept is not None:
        shutil.copytree(plan.options.kept, folder, dirs_exist_ok=True)
        return
    if checkpoint.kind == "gguf":
        from jaxsloth.data.tokenizer import load_tokenizer

        load_tokenizer(checkpoint.path).save_pretrained(str(folder))
        return
    for name in KEPT_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, folder / name)


def _stored_dtype(checkpoint: Checkpoint) -> DtypeName:
    """The dtype that most of a checkpoint's values are stored in; of quantized ones, what config.json says, else bfloat16."""
    source, counts = checkpoint.source, Counter()
    for name in source.names():
        stored = source.block_type(name) if isinstance(source, GgufSource) else source.stored_as(name)
        counts[stored] += int(np.prod(source.shape(name)))
    most = counts.most_common(1)[0][0]
    if checkpoint.kind in ("safetensors", "orbax", "pytorch") or (checkpoint.kind == "gguf" and most in _STORED):
        return _STORED[most]
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return said if said in _DTYPES else "bfloat16"


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

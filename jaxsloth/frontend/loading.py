"""A checkpoint as a backend's model with its tokenizer: what the command line and the module model begin with."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from jaxsloth.backend import Backend, BuildOptions, CheckpointingName, DeviceInfo, DtypeName, Model
from jaxsloth.convert.checkpoint import Checkpoint, find_checkpoint
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.frontend.backends import remember, resolve_backend
from jaxsloth.transforms import quantize

_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_CHECKPOINTING: dict[Any, CheckpointingName] = {True: "full", False: "none", None: "none", "unsloth": "offload"}


@dataclass(frozen=True)
class Loaded:
    """A base model: nothing of it is trained yet."""

    model: Model
    tokenizer: Any
    backend: Backend
    checkpoint: Checkpoint


def load(
    name: str,
    *,
    backend: str | None = None,
    dtype: Any = None,
    load_in_4bit: bool = False,
    nested: bool = True,
    gradient_checkpointing: CheckpointingName = "none",
    rope_scaling: Mapping[str, Any] | None = None,
    device_map: Any = "auto",
    hub: Mapping[str, Any] | None = None,
) -> Loaded:
    """Builds the model of a folder of safetensors, a .gguf file, ``package:NAME/file`` or a Hugging Face name.

    Args:
        dtype: "float32", "bfloat16", "float16" or the framework's own; None: bfloat16 on a GPU, float32 on a CPU.
        load_in_4bit: store the linear layers as NF4. nested: and its absmax in 8 bits.
        rope_scaling: in place of the checkpoint's, in Hugging Face's form.
        device_map: see `named_device`; a device that it numbers is used alone, by all models of the process.
        hub: `resolve_path`'s.

    Raises:
        ValueError: the checkpoint can't be read or is not supported, or an argument is wrong.
    """
    engine = resolve_backend(backend)
    index = named_device(device_map, engine.name, engine.devices())
    if index is not None:
        engine.use_device(index)
    options = BuildOptions(dtype_name(dtype, engine.devices()), gradient_checkpointing)
    opened = find_checkpoint(name, **(hub or {}))
    if rope_scaling is not None:
        parameters = dict(opened.config.get("rope_parameters") or {}) | dict(rope_scaling)
        opened = replace(opened, config=opened.config | {"rope_scaling": dict(rope_scaling), "rope_parameters": parameters})
    spec = opened.spec()
    tokenizer = load_tokenizer(opened.path)
    if load_in_4bit:
        spec = quantize(spec, nested=nested)
    model = engine.build(spec, opened.source, options)
    remember(engine)
    return Loaded(model, tokenizer, engine, opened)


def dtype_name(dtype: Any, devices: DeviceInfo) -> DtypeName:
    """A dtype's name, from its name or from a framework's own (torch.bfloat16, jnp.bfloat16)."""
    if dtype is None or dtype == "auto":
        return "float32" if devices.platform == "cpu" else "bfloat16"
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    name = name.removeprefix("torch.")
    if name not in get_args(DtypeName):
        raise ValueError(f"dtype must be one of {list(get_args(DtypeName))} or None, got {dtype!r}")
    return cast(DtypeName, name)


def checkpointing_name(value: Any) -> CheckpointingName:
    """``use_gradient_checkpointing`` as a backend calls it: True is "full", and "unsloth" is "offload" (to host memory)."""
    if isinstance(value, str) and value in get_args(CheckpointingName):
        return cast(CheckpointingName, value)
    if not isinstance(value, Hashable) or value not in _CHECKPOINTING:
        allowed = [True, False, "unsloth", *get_args(CheckpointingName)]
        raise ValueError(f"use_gradient_checkpointing must be one of {allowed}, got {value!r}")
    return _CHECKPOINTING[value]


def named_device(device_map: Any, backend: str, devices: DeviceInfo) -> int | None:
    """The number of the device that ``device_map`` names, or None where it leaves the backend its own: "auto" and its like,
    "cuda" and "cpu" leave it, "cuda:N" and N name one, and so does ``{"": any of these}``.

    Raises:
        ValueError: a device of another kind than the backend runs on, or a map of single layers.
    """
    place = device_map
    if isinstance(place, Mapping):
        if set(place) != {""}:
            raise ValueError(
                f'device_map must put the whole model on one device, as {{"": "cuda:0"}}, and it names {", ".join(place)}; '
                "leave single layers out"
            )
        place = place[""]
    text = f"{devices.platform}:{place}" if isinstance(place, int) else str(place)
    if place is None or text in _AUTOMATIC_MAPS:
        return None
    match = re.fullmatch(r"(cpu|cuda|gpu|tpu)(?::(\d+))?", text)
    if match is None:
        allowed = ", ".join((*_AUTOMATIC_MAPS, "cpu", "cuda", "cuda:N"))
        raise ValueError(f'device_map must be one of {allowed} or {{"": one of them}}, got {device_map!r}')
    if match[1].replace("gpu", "cuda") != devices.platform:
        raise ValueError(
            f"device_map asks for {text}, and backend {backend!r} runs on {devices.platform} ({devices.name}) here; leave "
            "device_map out, or choose by CUDA_VISIBLE_DEVICES which devices can be seen"
        )
    return None if match[2] is None else int(match[2])

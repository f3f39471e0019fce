"""Saving what was trained: merged into the base in 16 bits, in bitsandbytes' 4 bits or as GGUF, or as an adapter; and to the
hub. Merged models are written by `jaxsloth convert`'s code."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from jaxsloth.backend import DtypeName
from jaxsloth.convert.files import ExistsError, parse_size, remove_folder
from jaxsloth.convert.generation_config import FILE
from jaxsloth.convert.gguf_types import OUT_TYPES, check_available
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.convert.run import Format, Options, Plan, convert, plan_opened
from jaxsloth.convert.safetensors_writer import SHARD_BYTES
from jaxsloth.frontend.adapters import folded_adapter, native_adapter
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_where_set
from jaxsloth.frontend.decoding import end_ids

METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", "lora")
# Unsloth's other names of what GGUF files are stored as; None: 16 bits, as the model computes.
_GGUF_NAMES: dict[str, str | None] = {"not_quantized": None, "fast_quantized": "q8_0", "quantized": "q4_k_m"}
_REFUSED: dict[str, tuple[Any, str]] = {
    "safe_serialization": (True, "only safetensors are written"),
    "state_dict": (None, "the model's own weights are saved"),
    "variant": (None, "file names have no variants"),
}
_UNUSED: dict[str, tuple[Any, str]] = {
    "is_main_process": (True, "every process that calls this writes"),
    "save_peft_format": (True, "adapters are always in PEFT's format"),
    "temporary_location": ("_unsloth_temporary_saved_buffers", "at most one shard is held in memory"),
    "maximum_memory_usage": (0.9, "at most one shard is held in memory"),
    "tags": (None, "no model card is written"),
    "save_function": (None, "only safetensors are written"),
    "first_conversion": (None, "every type is made from the merged float32 weights"),
}
_OWN = ("push_to_hub", "token", "max_shard_size", "overwrite", "private", "commit_message", "revision")


class HubError(RuntimeError):
    """The Hugging Face hub could not be reached, or refused."""


def save_merged(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    max_shard_size: str | int = SHARD_BYTES,
    push_to_hub: bool = False,
    token: str | None = None,
    overwrite: bool = False,
    **others: Any,
) -> None:
    """Writes a model that transformers loads, or its adapter, with the tokenizer beside it.

    Args:
        tokenizer: the one that the model came with, where None.
        save_method: "merged_16bit" (a base that was loaded as NF4 from 16 bits is merged into those 16 bits), "merged_4bit"
            (bitsandbytes' NF4, nested) or "lora".
        push_to_hub: to the repository that the folder's name is, too.

    Raises:
        ExistsError: the folder holds something and overwrite is False.
        ValueError: an unknown save_method, or there is no adapter to save as "lora".
    """
    _check("save_pretrained_merged", others)
    if save_method not in METHODS:
        raise ValueError(f"save_method must be one of {', '.join(METHODS)}, got {save_method!r}")
    if folder.is_dir() and not any(folder.iterdir()):
        remove_folder(folder)
    if folder.exists() and not overwrite:
        raise ExistsError(f"{folder} holds something already; choose another folder, or pass overwrite=True to replace it")
    if save_method == "lora":
        spec, values = native_adapter(model)
        write_adapter(folder, spec, values, model.config.name_or_path, overwrite=overwrite)
        (tokenizer or model.tokenizer).save_pretrained(str(folder))
    else:
        to: Format = "hf" if save_method == "merged_16bit" else "bnb-4bit"
        size = parse_size(max_shard_size)
        with tempfile.TemporaryDirectory() as kept:
            convert(_planned(model, folder, to, tokenizer, Path(kept), shard_bytes=size, overwrite=overwrite))
    if push_to_hub:
        upload(folder, str(folder), token, **{key: others[key] for key in _OWN if key in others})


def save_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
    push_to_hub: bool = False,
    token: str | None = None,
    overwrite: bool = False,
    **others: Any,
) -> list[Path]:
    """Writes the merged model as GGUF files for llama.cpp, with tokenizer and chat template: ``folder/NAME.Q8_0.gguf``, one a
    method, NAME being the base's. Returns their paths. The folder may hold other files.

    Args:
        quantization_method: names of `gguf_types.OUT_TYPES` ("q8_0", "f16", "q4_k_m", …), or Unsloth's "not_quantized",
            "fast_quantized" (q8_0) and "quantized" (q4_k_m).
        push_to_hub: to the repository that the folder's name is, too.

    Raises:
        ExistsError: a file is there already and overwrite is False; nothing is written.
        ValueError: an unknown method, one whose package is missing, or a model that GGUF files can't hold.
    """
    _check("save_pretrained_gguf", others)
    outtypes, files = gguf_types(quantization_method, _dtype(model)), []
    name = Path(model.loaded.checkpoint.name).name.removesuffix(".gguf")
    with tempfile.TemporaryDirectory() as kept:
        plans = []
        for outtype in outtypes:
            file = folder / f"{name}.{outtype.upper()}.gguf"
            plans.append(_planned(model, file, "gguf", tokenizer, Path(kept), outtype=outtype, overwrite=overwrite))
        files = [convert(plan) for plan in plans]
    if push_to_hub:
        upload(folder, str(folder), token, **{key: others[key] for key in _OWN if key in others})
    return files


def gguf_types(methods: str | Sequence[str], dtype: DtypeName) -> list[str]:
    """The outtypes that quantization methods name, each once; dtype: what "not_quantized" stands for."""
    plain = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    found = []
    for method in [methods] if isinstance(methods, str) else methods:
        outtype = _GGUF_NAMES.get(str(method).lower(), str(method).lower()) or plain
        if outtype not in OUT_TYPES:
            known = ", ".join((*OUT_TYPES, *_GGUF_NAMES))
            raise ValueError(f"quantization_method must be one of {known}, or a list of them; got {method!r}")
        check_available(OUT_TYPES[outtype])
        found.append(outtype)
    if not found:
        raise ValueError("quantization_method must name at least one type, and the list is empty")
    return list(dict.fromkeys(found))


def save_as(model: Any, folder: Path, save_format: str, **settings: Any) -> None:
    """What ``save_pretrained(folder, save_format=…)`` writes: "gguf" (`save_gguf`), or a method of `save_merged`."""
    if save_format == "gguf":
        save_gguf(model, folder, **settings)
    elif save_format in METHODS:
        save_merged(model, folder, save_method=save_format, **settings)
    else:
        raise ValueError(f"save_format must be one of gguf, {', '.join(METHODS)}; got {save_format!r}")


def _check(function: str, others: dict[str, Any]) -> None:
    """Refuses arguments that are unknown or can't be meant, and names those that change nothing."""
    known = (*_OWN, *_REFUSED, *_UNUSED)
    refuse_unknown(function, known, {key: value for key, value in others.items() if key not in known})
    refuse_where_set(function, others, _REFUSED)
    warn_where_set(function, others, _UNUSED)


def _planned(model: Any, destination: Path, to: Format, tokenizer: Any, kept: Path, **options: Any) -> Plan:
    """The conversion of the model as it answers now; kept: an empty folder for its tokenizer and generation settings."""
    tokenizer = tokenizer or model.tokenizer
    tokenizer.save_pretrained(str(kept))
    _write_generation_config(kept, model, tokenizer)
    spec, values = folded_adapter(model)
    settings = Options(dtype=_dtype(model), kept=kept, **options)
    return plan_opened(model.loaded.checkpoint, spec, values, destination, to, settings)


def _write_generation_config(folder: Path, model: Any, tokenizer: Any) -> None:
    """How the model answers: its generation_config, with the tokenizer's end of sequence among the ends, which a chat template
    may have renamed since."""
    config, own = copy.deepcopy(model.generation_config), tokenizer.eos_token_id
    ends = end_ids(config)
    if ends and own is not None and own not in ends:
        config.eos_token_id = [*ends, own]
    (folder / FILE).write_text(config.to_json_string(), encoding="utf-8")


def push_merged(model: Any, repo_id: str, tokenizer: Any, save_method: str, token: str | None = None, **settings: Any) -> str:
    """`save_merged` into a repository of the Hugging Face hub, which is made where it does not exist; its address.

    Raises:
        HubError: the hub could not be reached, or refused.
    """
    hub = {key: settings.pop(key) for key in ("private", "commit_message", "revision") if key in settings}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        save_merged(model, target, tokenizer, save_method, **settings)
        return upload(target, repo_id, token, **hub)


def push_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any,
    quantization_method: str | Sequence[str],
    token: str | None = None,
    **settings: Any,
) -> str:
    """`save_gguf` into a repository of the Hugging Face hub, which is made where it does not exist; its address.

    Raises:
        HubError: the hub could not be reached, or refused.
    """
    hub = {key: settings.pop(key) for key in ("private", "commit_message", "revision") if key in settings}
    with tempfile.TemporaryDirectory() as folder:
        save_gguf(model, Path(folder), tokenizer, quantization_method, **settings)
        return upload(Path(folder), repo_id, token, **hub)


def upload(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    revision: str | None = None,
    **more: Any,
) -> Any:
    """The folder on the hub; its address. more: upload_folder's own arguments."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        settings = {"commit_message": commit_message, "revision": revision, **more}
        return api.upload_folder(repo_id=name, folder_path=folder, **settings)
    except (OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise HubError(
            f"{repo_id} could not be written on the Hugging Face hub: {error}\nThat needs a network, and a token with write "
            "access (token=, or huggingface-cli login); save_pretrained_merged writes to a folder without either"
        ) from error
    except Exception as error:  # the hub's http client is its own choice, and so are its errors
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests"):
            raise
        raise HubError(f"the Hugging Face hub could not be reached to write {repo_id}: {error}") from error


def _dtype(model: Any) -> DtypeName:
    """The 16-bit dtype that the model computes in, else that of its checkpoint, else bfloat16."""
    config = model.loaded.checkpoint.config
    for name in (model.engine.model.options.dtype, config.get("dtype"), config.get("torch_dtype")):
        if name in get_args(DtypeName) and name != "float32":
            return cast(DtypeName, name)
    return "bfloat16"

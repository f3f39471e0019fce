"""Saving what was trained: merged into the base in 16 bits or in bitsandbytes' 4 bits, or as an adapter; and to the hub."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from jaxsloth.backend import DtypeName, Model, TensorSource
from jaxsloth.convert.bnb4bit_writer import write_bnb4bit
from jaxsloth.convert.files import ExistsError, parse_size, remove_folder
from jaxsloth.convert.generation_config import FILE
from jaxsloth.convert.merge import write_merged
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.convert.safetensors_writer import SHARD_BYTES
from jaxsloth.frontend.adapters import folded_adapter, native_adapter
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_where_set
from jaxsloth.frontend.decoding import end_ids
from jaxsloth.kernels.nf4.contract import NF4
from jaxsloth.kernels.nf4.torch_ops import quantize

METHODS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", "lora")
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
    known = (*_OWN, *_REFUSED, *_UNUSED)
    refuse_unknown("save_pretrained_merged", known, {key: value for key, value in others.items() if key not in known})
    refuse_where_set("save_pretrained_merged", others, _REFUSED)
    warn_where_set("save_pretrained_merged", others, _UNUSED)
    if save_method not in METHODS:
        raise ValueError(f"save_method must be one of {', '.join(METHODS)}, and {save_method!r} came")
    if folder.is_dir() and not any(folder.iterdir()):
        remove_folder(folder)
    if folder.exists() and not overwrite:
        raise ExistsError(f"{folder} holds something already; choose another folder, or pass overwrite=True to replace it")
    if save_method == "lora":
        spec, values = native_adapter(model)
        write_adapter(folder, spec, values, model.config.name_or_path, overwrite=overwrite)
    else:
        write = write_merged if save_method == "merged_16bit" else partial(write_bnb4bit, quantize=_quantize)
        checkpoint, (spec, values) = model.loaded.checkpoint, folded_adapter(model)
        source = _Plain(checkpoint.source, model.engine.model) if checkpoint.kind == "bnb-4bit" else checkpoint.source
        size = parse_size(max_shard_size)
        write(folder, source, spec, values, checkpoint.config, _dtype(model), overwrite=overwrite, shard_bytes=size)
        _write_generation_config(folder, model, tokenizer or model.tokenizer)
    (tokenizer or model.tokenizer).save_pretrained(str(folder))
    if push_to_hub:
        upload(folder, str(folder), token, **{key: others[key] for key in _OWN if key in others})


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


def _quantize(weight: np.ndarray) -> NF4:
    return quantize(torch.from_numpy(weight), nested=True)


@dataclass(frozen=True)
class _Plain:
    """A checkpoint whose quantized weights are read as the model dequantizes them."""

    source: TensorSource
    model: Model

    def names(self) -> Sequence[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> np.ndarray:
        return self.model.base_tensor(name)


def _dtype(model: Any) -> DtypeName:
    """The 16-bit dtype that the model computes in, else that of its checkpoint, else bfloat16."""
    config = model.loaded.checkpoint.config
    for name in (model.engine.model.options.dtype, config.get("dtype"), config.get("torch_dtype")):
        if name in get_args(DtypeName) and name != "float32":
            return cast(DtypeName, name)
    return "bfloat16"

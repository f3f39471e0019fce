"""Each format as its own ecosystem's reader has it: what `check` compares. A new format is a function and a line in READERS."""

from __future__ import annotations

import json
import logging as logging_of_python
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.convert.check_orbax import orbax_weights
from jaxsloth.convert.gguf_source import GgufSource
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import read_object

# Tokens of a prompt that are compared.
LIMIT = 64
# Of llama.cpp, the likeliest next tokens whose log-probabilities are asked for: all 49,152 take 0.5 s a token to be told.
TOP = 2048


@dataclass(frozen=True)
class Reading:
    """What a reader makes of a checkpoint: the token ids of texts and of prompts, and for every token of a prompt the
    log-probabilities of the next, float32 ``[tokens, vocabulary]``, -inf where the reader does not tell them."""

    texts: list[list[int]]
    prompts: list[list[int]]
    log_probs: list[np.ndarray]


# (checkpoint, adapter's folder or None, texts, prompts as text or as token ids) -> Reading
Read = Callable[[Path, Path | None, Sequence[str], Sequence[str] | Sequence[list[int]]], Reading]


@dataclass(frozen=True)
class Reader:
    """name: who reads. packages: what must be installed for it. read: raises CheckpointError where it can't be read so."""

    name: str
    packages: tuple[str, ...]
    read: Read


def read_by_transformers(
    path: Path, adapter: Path | None, texts: Sequence[str], prompts: Sequence[str] | Sequence[list[int]]
) -> Reading:
    """transformers in float32 on the CPU, with PEFT's adapter on it; a .gguf file is dequantized by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging_of_python.getLogger("bitsandbytes").setLevel(logging_of_python.ERROR)  # a warning a product of 8-bit layers
    where: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    folder = str(path.parent if path.is_file() else path)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **where)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **where)
        model = _adapted(model, adapter)
    except Exception as error:  # another project's reader fails in its own ways, and that it fails is what was asked
        raise CheckpointError(f"{path}: transformers can't load it: {_line(error)}") from error
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' layers would round activations to the stored dtype
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return _run(model, tokenizer, texts, prompts)


def read_by_orbax(
    path: Path, adapter: Path | None, texts: Sequence[str], prompts: Sequence[str] | Sequence[list[int]]
) -> Reading:
    """A tree that plain orbax reads, its arrays put by their documented paths into transformers' model of config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    weights = orbax_weights(path, read_object(path / "config.json", CheckpointError))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
        config = AutoConfig.from_pretrained(str(path))
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in weights.items()}
        missing, left = model.load_state_dict(state, strict=False)
        model.tie_weights()
        model = _adapted(model, adapter)
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: transformers can't take the tree's arrays: {_line(error)}") from error
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or left:
        raise CheckpointError(f"{path}: the tree lacks {sorted(set(missing) - tied)[:20]}, and transformers lacks {left[:20]}")
    return _run(model, tokenizer, texts, prompts)


def _adapted(model: Any, adapter: Path | None) -> Any:
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")


def _run(model: Any, tokenizer: Any, texts: Sequence[str], prompts: Sequence[str] | Sequence[list[int]]) -> Reading:
    import torch

    encoded = [list(prompt) if isinstance(prompt, list) else list(tokenizer(prompt).input_ids) for prompt in prompts]
    encoded = [ids[:LIMIT] for ids in encoded]
    rows = []
    with torch.inference_mode():
        for ids in encoded:
            logits = model.eval()(torch.tensor([ids])).logits[0].double()
            rows.append(torch.log_softmax(logits, -1).float().numpy())
    return Reading([list(tokenizer(text).input_ids) for text in texts], encoded, rows)


def read_by_llama_cpp(
    path: Path, adapter: Path | None, texts: Sequence[str], prompts: Sequence[str] | Sequence[list[int]]
) -> Reading:
    """llama.cpp on the CPU with a cache in float32: the `TOP` likeliest next tokens. adapter: a GGUF LoRA file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reading.npz"
        lora = str(adapter) if adapter is not None else None
        request = {"file": str(path), "lora": lora, "texts": list(texts), "prompts": list(prompts), "limit": LIMIT}
        request |= {"top": TOP, "vocabulary": GgufSource(path).tokens()}
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        done = subprocess.run(
            [sys.executable, "-P", str(worker)],
            input=json.dumps(request | {"out": str(out)}).encode(),
            capture_output=True,
            check=False,
        )
        if done.returncode or not out.is_file():
            said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
            wrong = [line for line in said if " E " in line or "rror" in line or line.startswith("llama.cpp")] or said
            raise CheckpointError(f"{path}: llama.cpp can't run it: {' | '.join(wrong[-3:]) or f'exit {done.returncode}'}")
        with np.load(out) as found:
            tokens, ids = json.loads(str(found["tokens"]))
            return Reading(tokens, ids, [found[f"log_probs.{index}"] for index in range(len(ids))])


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_TRANSFORMERS = ("torch", "accelerate")
# By a checkpoint's kind.
READERS: dict[str, Reader] = {
    "safetensors": Reader("transformers", _TRANSFORMERS, read_by_transformers),
    "bnb-4bit": Reader("transformers + bitsandbytes", (*_TRANSFORMERS, "bitsandbytes"), read_by_transformers),
    "bnb-8bit": Reader("transformers + bitsandbytes", (*_TRANSFORMERS, "bitsandbytes"), read_by_transformers),
    "gguf": Reader("llama.cpp", ("xllamacpp",), read_by_llama_cpp),
    "orbax": Reader("orbax, in transformers' model", _TRANSFORMERS, read_by_orbax),
}
# Who applies PEFT's adapter to a source: PEFT, on what transformers reads, whatever the source's kind.
MERGED = Reader("transformers + PEFT", (*_TRANSFORMERS, "peft"), read_by_transformers)

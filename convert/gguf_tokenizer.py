"""A tokenizer's part of a GGUF file's metadata, from tokenizer.json: BPE on bytes, as Llama 3, SmolLM, Qwen and GPT-2 have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import read_object

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types
_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# llama.cpp's names of the splits that come before BPE, by the regular expression of tokenizer.json.
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}"): "qwen2"}


def tokenizer_fields(folder: Path, vocab: int, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``tokenizer.…`` fields of a checkpoint folder's tokenizer.

    Args:
        vocab: rows of the embedding; tokens past the tokenizer's own are named unused.
        ids: "bos", "eos", "padding" -> a token's id, or None.

    Raises:
        CheckpointError: there is no tokenizer.json, it is no byte-level BPE, its split is unknown to llama.cpp, or it has more
            tokens than the embedding has rows.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no tokenizer.json, from which a GGUF file's tokenizer is made")
    document = read_object(file, CheckpointError)
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"{file}: model.type must be BPE on bytes; others can't be written to GGUF yet")
    tokens: list[str | None] = [None] * vocab
    types = [UNUSED] * vocab
    for text, index in model["vocab"].items():
        _place(tokens, types, index, text, NORMAL, file)
    for added in document.get("added_tokens", []):
        _place(tokens, types, added["id"], added["content"], CONTROL if added.get("special") else USER_DEFINED, file)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split(document.get("pre_tokenizer"), file),
        "tokenizer.ggml.tokens": [f"[PAD{index}]" if text is None else text for index, text in enumerate(tokens)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    fields |= {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    settings = read_object(folder / "tokenizer_config.json", CheckpointError) if _has(folder, "tokenizer_config.json") else {}
    fields["tokenizer.ggml.add_bos_token"] = _adds_bos(document, settings)
    return fields | template_field(folder)


def template_field(folder: Path) -> dict[str, str]:
    """The chat template's field; none where a checkpoint folder has no template."""
    if _has(folder, "chat_template.jinja"):
        return {"tokenizer.chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    settings = read_object(folder / "tokenizer_config.json", CheckpointError) if _has(folder, "tokenizer_config.json") else {}
    template = settings.get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _place(tokens: list[str | None], types: list[int], index: int, text: str, kind: int, file: Path) -> None:
    if not 0 <= index < len(tokens):
        raise CheckpointError(f"{file}: token {text!r} has the id {index}, and the embedding has {len(tokens)} rows")
    tokens[index], types[index] = text, kind


def _adds_bos(document: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether encoding puts the first token there by itself: said by the settings, or done by the post-processor."""
    if settings.get("add_bos_token") is not None:
        return bool(settings["add_bos_token"])
    processors = document.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        single = processor.get("single") or []
        if single and "SpecialToken" in single[0]:
            return True
    return False


def _split(pre_tokenizer: Any, file: Path) -> str:
    """llama.cpp's name of what splits a text before BPE."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and patterns[0] in _SPLITS:
        return _SPLITS[patterns[0]]
    raise CheckpointError(f"{file}: llama.cpp has no name that is known here for the pre-tokenizer {kinds}")

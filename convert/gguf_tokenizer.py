"""A tokenizer's part of a GGUF file's metadata, from tokenizer.json: BPE on bytes (Llama 3, SmolLM, Qwen, GPT-2, Mistral's
tekken, Phi-4), and SentencePiece's BPE (Llama 2, Mistral 7B, Phi-3, Gemma)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.foreign import read_object, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE = "▁"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    f"{_CONTRACTIONS}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_UPPER, _LOWER = "\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}", "\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}"
_TEKKEN = (
    f"[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_GPT4O = (
    f"[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|[^\\r\\n\\p{{L}}\\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    f"{_CONTRACTIONS}?|\\p{{N}}{{1,3}}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# llama.cpp's names of the splits that come before BPE: the regular expression of tokenizer.json, and whether a piece that is a
# token is taken whole, without merges.
SPLITS: dict[str, tuple[str, bool]] = {
    "llama-bpe": (_LLAMA3, True),
    "dbrx": (_LLAMA3, False),
    "qwen2": (_LLAMA3.replace("\\p{N}{1,3}", "\\p{N}"), False),
    "tekken": (_TEKKEN, True),
    "gpt-4o": (_GPT4O, False),
}


def tokenizer_fields(folder: Path, vocab: int, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``tokenizer.…`` fields of a checkpoint folder's tokenizer.

    Args:
        vocab: rows of the embedding; tokens past the tokenizer's own are named unused.
        ids: "bos", "eos", "padding" -> a token's id, or None.

    Raises:
        CheckpointError: there is no tokenizer.json, llama.cpp has no such tokenizer, or it has more tokens than the embedding
            has rows.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no tokenizer.json, from which a GGUF file's tokenizer is made")
    document = read_object(file, CheckpointError)
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise CheckpointError(f"{file}: model.type must be BPE, got {kind!r}; others can't be written to GGUF")
    _check_model(document, file)
    merges = [_pair(merge) for merge in model["merges"]]
    tokens: list[str | None] = [None] * vocab
    types = [UNUSED] * vocab
    pieces = bool(model.get("byte_fallback"))
    for text, index in model["vocab"].items():
        kind = BYTE if pieces and _is_byte(text) else UNKNOWN if pieces and text == model.get("unk_token") else NORMAL
        _place(tokens, types, index, text, kind, file)
    for added in document.get("added_tokens", []):
        if types[added["id"] : added["id"] + 1] != [UNKNOWN]:
            _place(tokens, types, added["id"], added["content"], CONTROL if added.get("special") else USER_DEFINED, file)
    named = [f"[PAD{index}]" if text is None else text for index, text in enumerate(tokens)]
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": named, "tokenizer.ggml.token_type": types}
    fields |= _pieces(document, merges, named, file) if pieces else _bytes(document, merges, file)
    fields |= {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    settings = _settings(folder)
    for name, place in (("bos", 0), ("eos", -1)):
        fields[f"tokenizer.ggml.add_{name}_token"] = _adds(document, settings, name, place)
    return fields | template_field(folder)


def _check_model(document: Mapping[str, Any], file: Path) -> None:
    """That tokenizer.json's vocabulary, merges and added tokens are what their names say."""
    model, added = document["model"], document.get("added_tokens", [])
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise CheckpointError(f"{file}: model.vocab must be an object of tokens and their ids, got {shown(vocab)}")
    if not isinstance(merges, list) or not merges:
        raise CheckpointError(
            f"{file}: model.merges must hold at least one merge, as llama.cpp loads no tokenizer without any; got "
            f"{shown(merges)}"
        )
    wrong = next((merge for merge in merges if len(_pair(merge)) != 2), None)
    if wrong is not None:
        raise CheckpointError(f"{file}: each of model.merges must be two tokens, got {shown(wrong)}")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str) for token in added
    ):
        raise CheckpointError(f"{file}: added_tokens must be a list of objects with id and content, got {shown(added)}")


def _pair(merge: Any) -> tuple[str, ...]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return tuple(parts) if isinstance(parts, list) and all(isinstance(part, str) for part in parts) else ()


def _bytes(document: Mapping[str, Any], merges: list[tuple[str, ...]], file: Path) -> dict[str, Any]:
    """Of BPE on bytes: how a text is split first, and the merges."""
    normalizer = document.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":  # llama.cpp takes a text as it is
        raise CheckpointError(f"{file}: normalizer must be none (or NFC), as llama.cpp has none; got {normalizer.get('type')}")
    pre = _split(document.get("pre_tokenizer"), bool(document["model"].get("ignore_merges")), file)
    joined = [" ".join(merge) for merge in merges]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": joined}


def _pieces(document: Mapping[str, Any], merges: list[tuple[str, ...]], tokens: list[str], file: Path) -> dict[str, Any]:
    """Of SentencePiece's BPE: a score a token, from the merges' order, and whether a space comes before a text."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    lowest = float(-len(merges) - 1)
    unknown = document["model"].get("unk_token")
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-first[text]) if text in first else lowest for text in tokens],
        "tokenizer.ggml.add_space_prefix": _adds_space(document, file),
    }
    return fields | ({"tokenizer.ggml.unknown_token_id": tokens.index(unknown)} if unknown in tokens else {})


def _adds_space(document: Mapping[str, Any], file: Path) -> bool:
    normalizer, split = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Prepend", "Replace"] and not split:
        return True
    if kinds == ["Replace"] and split.get("type") in (None, "Split"):
        return False
    if not kinds and split.get("type") == "Metaspace" and split.get("prepend_scheme") in ("first", "always", "never"):
        return split["prepend_scheme"] != "never"
    raise CheckpointError(
        f"{file}: llama.cpp has SentencePiece's spaces alone, not the normalizer {kinds} and the pre-tokenizer "
        f"{split.get('type')}"
    )


def template_field(folder: Path) -> dict[str, str]:
    """The chat template's field; none where a checkpoint folder has no template."""
    if (folder / "chat_template.jinja").is_file():
        return {"tokenizer.chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    template = _settings(folder).get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_object(file, CheckpointError) if file.is_file() else {}


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _place(tokens: list[str | None], types: list[int], index: int, text: str, kind: int, file: Path) -> None:
    if not 0 <= index < len(tokens):
        raise CheckpointError(f"{file}: token {text!r} has the id {index}, and the embedding has {len(tokens)} rows")
    tokens[index], types[index] = text, kind


def _adds(document: Mapping[str, Any], settings: Mapping[str, Any], name: str, place: int) -> bool:
    """Whether encoding puts the first (0) or last (-1) token there by itself: said by the settings, or done by the
    post-processor."""
    if settings.get(f"add_{name}_token") is not None:
        return bool(settings[f"add_{name}_token"])
    processors = document.get("post_processor") or {}
    for processor in processors.get("processors", [processors]):
        single = processor.get("single") or []
        if single and "SpecialToken" in single[place]:
            return True
    return False


def _split(pre_tokenizer: Any, whole: bool, file: Path) -> str:
    """llama.cpp's name of what splits a text before BPE. whole: pieces that are tokens are not merged."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    kinds = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        found = {merging: name for name, (pattern, merging) in SPLITS.items() if pattern == patterns[0]}
        if found:
            return found.get(whole, next(iter(found.values())))
    raise CheckpointError(f"{file}: llama.cpp has no name that is known here for the pre-tokenizer {kinds}")

"""A GGUF file's tokenizer as transformers': what `gguf_tokenizer` writes, and others' files of the same kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsloth.convert.gguf_config import open_gguf, values_of
from jaxsloth.convert.gguf_tokenizer import CONTROL, NORMAL, SPACE, SPLITS, UNKNOWN, UNUSED, USER_DEFINED

_PREFIX = "tokenizer.ggml."
# Where a file does not say whether BOS comes first, llama.cpp's own choice.
_BEGIN_BY_THEMSELVES = ("llama-bpe", "tekken")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def read_tokenizer(path: Path) -> Any:
    """The file's tokenizer; None where it is of a kind that is not known here.

    Raises:
        CheckpointError: the file can't be read.
    """
    reader = open_gguf(path)
    fields = values_of(reader, [name for name in reader.fields if name.startswith("tokenizer.")], path)
    document = _document(fields)
    if document is None:
        return None
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    named = {f"{ours}_token": _token(fields, theirs) for ours, theirs in _NAMES.items()}
    built = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)), **{name: text for name, text in named.items() if text}
    )
    built.chat_template = fields.get("tokenizer.chat_template")
    return built


_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def _token(fields: Mapping[str, Any], name: str) -> str | None:
    index, tokens = fields.get(f"{_PREFIX}{name}_token_id"), fields.get(f"{_PREFIX}tokens", ())
    return tokens[index] if index is not None and index < len(tokens) else None


def _document(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """tokenizer.json's content."""
    tokens, model = fields.get(f"{_PREFIX}tokens"), fields.get(f"{_PREFIX}model")
    pre = fields.get(f"{_PREFIX}pre", "gpt-2")
    if tokens is None or (model == "gpt2" and pre not in (*SPLITS, "gpt-2", "smollm")) or model not in ("gpt2", "llama"):
        return None
    types = fields.get(f"{_PREFIX}token_type") or [NORMAL] * len(tokens)
    vocab = {text: index for index, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    added = [
        _added(index, text, special=kind != USER_DEFINED)
        for index, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    begins = fields.get(f"{_PREFIX}add_bos_token", model == "llama" or pre in _BEGIN_BY_THEMSELVES)
    ends = fields.get(f"{_PREFIX}add_eos_token", False)
    kind = _pieces(fields, vocab, types) if model == "llama" else _bytes(fields, vocab, pre)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _around(_token(fields, "bos") if begins else None, _token(fields, "eos") if ends else None, fields),
        **kind,
    }


def _added(index: int, text: str, *, special: bool) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": special} | off


def _around(begin: str | None, end: str | None, fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """What puts the first and the last token there."""
    if begin is None and end is None:
        return None

    def template(parts: list[str]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            found += [{"SpecialToken": {"id": begin, "type_id": number}}] if begin else []
            found += [{"Sequence": {"id": part, "type_id": number}}]
            found += [{"SpecialToken": {"id": end, "type_id": number}}] if end else []
        return found

    ids = {"bos": begin, "eos": end}
    used = {
        text: {"id": text, "ids": [fields[f"{_PREFIX}{name}_token_id"]], "tokens": [text]} for name, text in ids.items() if text
    }
    return {"type": "TemplateProcessing", "single": template(["A"]), "pair": template(["A", "B"]), "special_tokens": used}


def _model(vocab: Mapping[str, int], merges: list[Any], **settings: Any) -> dict[str, Any]:
    off = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    more = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | settings
    return {"type": "BPE"} | off | more | {"vocab": dict(vocab), "merges": merges}


def _bytes(fields: Mapping[str, Any], vocab: Mapping[str, int], pre: str) -> dict[str, Any]:
    pattern, whole = SPLITS.get(pre, ("", False))
    split: dict[str, Any] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = _BYTE_LEVEL
    if pre in ("gpt-2", "smollm"):  # the split of GPT-2 is ByteLevel's own
        split, byte_level = {"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}
    steps = [byte_level] if pre == "gpt-2" else [split, byte_level]
    merges = [tuple(merge.split(" ")) for merge in fields.get(f"{_PREFIX}merges", ())]
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": _model(vocab, merges, ignore_merges=whole),
    }


def _pieces(fields: Mapping[str, Any], vocab: Mapping[str, int], types: list[int]) -> dict[str, Any]:
    """The merges are all pairs of tokens that make a token, the best score first."""
    scores = fields[f"{_PREFIX}scores"]
    found = []
    for text, index in vocab.items():
        if types[index] != NORMAL:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[index], index, vocab[left], vocab[right], (left, right)))
    space, prefixed = {"String": " "}, fields.get(f"{_PREFIX}add_space_prefix", True)
    replace = {"type": "Replace", "pattern": space, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefixed else [replace]
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back + strip},
        "model": _model(
            vocab,
            [merge for *_, merge in sorted(found)],
            unk_token=_token(fields, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        ),
    }

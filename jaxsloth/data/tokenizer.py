"""A checkpoint's tokenizer, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from jaxsloth.data.errors import DataError
from jaxsloth.foreign import MEBIBYTE, Schema, checked, local_path, read_object, read_text, validated

_TOKENIZER_BYTES = 512 * MEBIBYTE
_SMALL = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "config.json")
_ONE_OBJECT = "tokenizer.json"


def _is_template(value: Any) -> bool:
    named = isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("name"), str) and isinstance(part.get("template"), str) for part in value
    )
    return isinstance(value, str) or named


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


Token = Annotated[Any, checked("a string, or an object with a content", _is_token)]
Template = Annotated[Any, checked("a string, or a list of objects with a name and a template", _is_template)]
Number = Annotated[
    float, checked("a positive number", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v > 0)
]


class TokenizerFields(Schema):
    """The fields of tokenizer_config.json that decide what rows become."""

    tokenizer_class: str | None = None
    chat_template: Template | None = None
    bos_token: Token | None = None
    eos_token: Token | None = None
    pad_token: Token | None = None
    unk_token: Token | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    legacy: bool | None = None
    model_max_length: Number | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of a checkpoint.

    Args:
        path: a folder with tokenizer files, a ``.gguf`` file (which holds its tokenizer), or a Hugging Face name.

    Raises:
        DataError: there is no such checkpoint, it holds no tokenizer, or a package that reads it isn't installed.
    """
    from transformers import AutoTokenizer

    file = local_path(path, "the tokenizer's folder", DataError)
    is_gguf = file.suffix.lower() == ".gguf"
    if not file.exists() and (is_gguf or file.is_absolute()):
        raise DataError(f"no checkpoint at {file}, so no tokenizer either")
    if file.is_dir():
        _check_files(file)
    try:
        if is_gguf:
            return _of_gguf(file)
        return AutoTokenizer.from_pretrained(str(file) if file.exists() else str(path))
    except ImportError as error:
        hint = "; transformers reads GGUF's tokenizers through torch; run: pip install 'jaxsloth[torch]'" if is_gguf else ""
        raise DataError(f"the tokenizer of {path} needs a package that isn't installed: {error}{hint}") from error
    except BaseException as error:  # transformers and tokenizers fail in any way, tokenizers' panics as a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"no tokenizer could be loaded from {path}: {_told(error)}\nA checkpoint folder must hold tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json: copy them from the model that it was made from"
        ) from error


def _of_gguf(file: Path) -> Any:
    """By our reader, or transformers' for kinds that ours has not; theirs goes by the architecture in places, and makes another
    tokenizer of a Gemma file with BPE on bytes."""
    from transformers import AutoTokenizer

    from jaxsloth.convert.gguf_tokenizer_reader import read_tokenizer

    found = read_tokenizer(file)
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name) if found is None else found


def _check_files(folder: Path) -> None:
    """That the tokenizer's files are JSON of the right kinds, before transformers reads them."""
    for name in _SMALL:
        if (folder / name).exists():
            read_object(folder / name, DataError)
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        validated(TokenizerFields, read_object(settings, DataError), settings, DataError)
    if (folder / "chat_template.jinja").exists():
        read_text(folder / "chat_template.jinja", DataError, MEBIBYTE)
    whole = folder / _ONE_OBJECT
    if whole.exists() and not read_text(whole, DataError, _TOKENIZER_BYTES).lstrip().startswith("{"):
        raise DataError(f"{whole} must hold an object of keys and values")  # the rest is for the tokenizers package to check


def _told(error: BaseException) -> str:
    """What a tokenizer's reader says, in a line."""
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"

"""A checkpoint's tokenizer, through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxsloth.data.errors import DataError


def load_tokenizer(path: str | Path) -> Any:
    """The transformers tokenizer of a checkpoint.

    Args:
        path: a folder with tokenizer files, a ``.gguf`` file (which holds its tokenizer), or a Hugging Face name.

    Raises:
        DataError: there is no such checkpoint, or it holds no tokenizer.
    """
    from transformers import AutoTokenizer

    file = Path(path)
    try:
        if file.suffix.lower() == ".gguf":
            if not file.is_file():
                raise DataError(f"no GGUF file at {file}")
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, KeyError) as error:  # KeyError: a GGUF file without tokenizer metadata
        raise DataError(_absent(path, error)) from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(_absent(path, error)) from error


def _absent(path: str | Path, error: Exception) -> str:
    return (
        f"no tokenizer could be loaded from {path}: {error}\n"
        "A checkpoint folder must hold tokenizer.json (or tokenizer.model) and tokenizer_config.json: copy them from the model "
        "that it was made from."
    )

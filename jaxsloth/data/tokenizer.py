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
        DataError: there is no such checkpoint, it holds no tokenizer, or a package that reads it isn't installed.
    """
    from transformers import AutoTokenizer

    file = Path(path)
    is_gguf = file.suffix.lower() == ".gguf"
    if not file.exists() and (is_gguf or file.is_absolute()):
        raise DataError(f"no checkpoint at {file}, so no tokenizer either")
    try:
        if is_gguf:
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoTokenizer.from_pretrained(str(path))
    except ImportError as error:
        hint = "; transformers reads GGUF's tokenizers through torch; run: pip install 'jaxsloth[torch]'" if is_gguf else ""
        raise DataError(f"the tokenizer of {path} needs a package that isn't installed: {error}{hint}") from error
    except (OSError, ValueError, KeyError) as error:  # KeyError: a GGUF file without tokenizer metadata
        raise DataError(
            f"no tokenizer could be loaded from {path}: {error}\nA checkpoint folder must hold tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json: copy them from the model that it was made from"
        ) from error

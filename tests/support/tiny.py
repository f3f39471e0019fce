"""A Llama of 4 layers and width 64 with its tokenizer and rows, written as a user's would be, and recipes that train it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.recipe import Recipe, make_recipe

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
WORDS = ["the", "duck", "lays", "sixteen", "eggs", "a", "day", "and", "sells", "them", "at", "every", "market"]


def write_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama in float32 safetensors, with a byte-level tokenizer; `changes` are fields of its config."""
    folder.mkdir(parents=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return folder


def with_merge(folder: Path) -> Path:
    """The checkpoint with a merge in its tokenizer, "he": llama.cpp loads none without any."""
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["model"] |= {"vocab": document["model"]["vocab"] | {"he": 258}, "merges": [["h", "e"]]}
    file.write_text(json.dumps(document), encoding="utf-8")
    return folder


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(seed))
    weights = {}
    for name, shape in tensor_shapes(spec_from_config(config)).items():
        around, width = (1.0, 0.1) if len(shape) == 1 else (0.0, shape[-1] ** -0.5)
        weights[name] = generator.normal(around, width, shape).astype(np.float32)
    return weights


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<bos>": 0, "<eos>": 1} | {byte: place for place, byte in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def write_rows(file: Path, count: int = 22) -> Path:
    """Prompts and completions of unequal lengths, 15 to 60 tokens in all."""
    generator = np.random.Generator(np.random.Philox(7))
    lines = []
    for number in range(count):
        words = generator.choice(WORDS, 3 + number % 6)
        row = {"prompt": f"{number}: {words[0]} ", "completion": " ".join(words[1:])}
        lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return file


def recipe_values(model: Path, rows: Path, output: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe as plain data: 6 steps of 2 × 2 rows in float32 with clipping, decay and dropout; `changes` replace fields."""
    return {
        "model": str(model),
        "data": {"path": str(rows), "max_length": 64, "pad_to_multiple_of": 64},
        "backend": "torch",
        "dtype": "float32",
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "checkpoints": {"output": str(output)},
        "seed": 11,
    } | changes


def tiny_recipe(model: Path, rows: Path, output: Path, /, **changes: Any) -> Recipe:
    return make_recipe(recipe_values(model, rows, output, **changes))

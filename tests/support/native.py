"""Models for the native trainers, and what a judge's model shares with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jaxsloth import FastLanguageModel


def native_model(checkpoint: str, backend: str, **changes: Any) -> tuple[Any, Any]:
    """(model with a fresh adapter, tokenizer) in float32; changes: get_peft_model's settings."""
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=False, max_seq_length=64)
    settings = {"r": 4, "lora_alpha": 8, "use_gradient_checkpointing": False, "random_state": 1} | changes
    return FastLanguageModel.get_peft_model(model, **settings), tokenizer


def same_adapter(ours: Any, theirs: Any) -> Any:
    """`theirs`, with the adapter of `ours`."""
    state = {name: p.detach() for name, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    return theirs


def under_their_peft(ours: Any, base: Any) -> Any:
    """transformers' base under PEFT's own adapter, alike to that of `ours`."""
    import peft

    config = {name: value for name, value in ours.peft_config["default"].to_dict().items() if name != "peft_type"}
    return same_adapter(ours, peft.get_peft_model(base, peft.LoraConfig(**config)))


def logged(history: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([entry[name] for entry in history if name in entry])

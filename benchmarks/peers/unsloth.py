"""Unsloth through its public API, in a process of its own: importing it patches torch, transformers and PEFT."""

from __future__ import annotations

from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip  (before everything that it patches)

from benchmarks.peers.torch_loop import DTYPES, PeftRunner, limit_memory, synchronize
from benchmarks.work import Work

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(folder: Path, work: Work) -> PeftRunner:
    """Loads the checkpoint; checkpointing is "unsloth" (layer inputs offloaded), "true" or "false"."""
    words: dict[str, bool | str] = {"unsloth": "unsloth", "true": True, "false": False}
    if work.checkpointing not in words:
        raise ValueError(f"unsloth's checkpointing must be one of {list(words)}, got {work.checkpointing!r}")
    limit_memory(work)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=work.length,
        dtype=DTYPES[work.dtype],
        load_in_4bit=work.quantization == "nf4",
    )
    if work.lora:
        model = FastLanguageModel.get_peft_model(
            model,
            r=work.r,
            lora_alpha=work.alpha,
            target_modules=PROJECTIONS,
            lora_dropout=0.0,
            bias="none",
            use_gradient_checkpointing=words[work.checkpointing],
        )
    model.train()
    synchronize()
    return PeftRunner(model, work)

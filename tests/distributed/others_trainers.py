"""Run by torchrun: TRL's SFTTrainer over transformers' model, then over each backend's module; rank 0 prints its logs."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from jaxsloth import FastLanguageModel
from tests.support.tiny import CONFIG, byte_tokenizer

SETTINGS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 64,
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_grad_norm": 0.5,
}


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    lengths = [8 + 3 * (n % 9) for n in range(30)]
    return Dataset.from_list(
        [{"input_ids": torch.randint(2, CONFIG["vocab_size"], (length,), generator=generator).tolist()} for length in lengths]
    )


def main(checkpoint: str, output: str) -> None:
    found = {}
    for name in ("transformers", "torch", "jax"):
        if name == "transformers":
            base: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        else:
            base, _ = FastLanguageModel.from_pretrained(checkpoint, backend=name, load_in_4bit=False, max_seq_length=64)
        torch.manual_seed(7)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        args = trl.SFTConfig(f"{output}/{name}", **SETTINGS)
        trainer = trl.SFTTrainer(model, args=args, train_dataset=rows(), processing_class=byte_tokenizer())
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {n: p.detach().double().norm().item() for n, p in model.named_parameters() if p.requires_grad}
        found[name] = {key: [entry[key] for entry in log] for key in ("loss", "grad_norm")} | {
            "weights": list(weights.values())
        }
    if os.environ["RANK"] == "0":
        print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

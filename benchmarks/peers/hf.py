"""transformers + PEFT + bitsandbytes with torch's SDPA, as their documentation has it."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peers.torch_loop import DTYPES, PeftRunner, device, limit_memory, synchronize
from benchmarks.work import Work

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(folder: Path, work: Work) -> PeftRunner:
    """Loads the checkpoint; checkpointing is "true" or "false".

    prepare_model_for_kbit_training is left out: it would turn embedding, head and norms into float32, slower and larger.
    """
    if work.checkpointing not in ("true", "false"):
        raise ValueError(f"hf's checkpointing must be 'true' or 'false', got {work.checkpointing!r}")
    limit_memory(work)
    dtype = DTYPES[work.dtype]
    quantization = None
    if work.quantization == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", quantization_config=quantization, device_map={"": device()}
    )
    if work.lora:
        if work.checkpointing == "true":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        config = LoraConfig(
            r=work.r, lora_alpha=work.alpha, target_modules=PROJECTIONS, lora_dropout=0.0, task_type="CAUSAL_LM"
        )  # type: ignore[arg-type]
        model = get_peft_model(model, config)
    model.train()
    synchronize()
    return PeftRunner(model, work)

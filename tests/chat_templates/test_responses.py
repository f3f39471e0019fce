"""train_on_responses_only: the right tokens, in this project's trainer, TRL's and transformers'."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig as TrlConfig
from trl import SFTTrainer as TrlTrainer

from jaxsloth import FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.batch import IGNORE
from jaxsloth.chat_templates import get_chat_template, train_on_responses_only
from jaxsloth.chat_templates.parts import find_parts, token_bytes
from jaxsloth.data.catalogue import TEMPLATES
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import Conversation
from jaxsloth.data.templates import ChatTemplate
from tests.data.test_catalogue import CALLS, THOUGHTS
from tests.support.real_tokenizers import MISTRAL_FILES, llama3, mistral, qwen
from tests.support.tiny import byte_tokenizer, write_checkpoint

TURNS = [
    {"role": "user", "content": "  How many eggs? é😀\n"},
    {"role": "assistant", "content": "\nSixteen.\n\n  A day."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because 😀"},
]
CHATML_PARTS = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}


def rows_of(tokenizer, conversations=(TURNS, TURNS[:2])):
    return [{"text": tokenizer.apply_chat_template(messages, tokenize=False)} for messages in conversations]


def labels_of(tokenizer, text, **parts):
    function = train_on_responses_only(None, tokenizer=tokenizer, return_function=True, **parts)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, function({"input_ids": [ids]})["labels"][0]


def learnt(tokenizer, ids, labels):
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


def real(name, smollm2):
    made = {"qwen-2.5": qwen, "qwen-3": qwen, "llama-3": llama3, "llama-3.1": llama3, "mistral": lambda: mistral("v3-tekken")}
    return get_chat_template(copy.deepcopy(made.get(name, lambda: smollm2)()), chat_template=name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_parts_are_found_and_the_answers_learnt(name, smollm2):
    tokenizer = real(name, smollm2)
    template = ChatTemplate(tokenizer)
    for messages in (TURNS, TURNS[:2]):
        tokens, marked = template.encode(Conversation(messages))  # what the template itself says that answers are
        ids, labels = labels_of(tokenizer, template.render(messages))
        assert ids == tokens.tolist()
        differing = np.flatnonzero((np.array(labels) != IGNORE) != marked)
        assert all(not tokenizer.decode([ids[place]]).strip() for place in differing), "a line break behind the end at most"
        ends = sum(label == tokenizer.eos_token_id for label in labels)
        assert ends == len(messages) // 2, "each answer's end is learnt, and no question's"


@pytest.mark.parametrize("version", MISTRAL_FILES)
def test_the_makers_own_mistral_templates(version):
    tokenizer = mistral(version)
    ids, labels = labels_of(tokenizer, tokenizer.apply_chat_template(TURNS, tokenize=False))
    found = learnt(tokenizer, ids, labels)
    assert [part.strip() for part in found.split("</s>")] == ["Sixteen.\n\n  A day.", "Because 😀", ""]


def test_smollm2s_own_template_and_given_parts(smollm2):
    text = rows_of(smollm2)[0]["text"]
    found = find_parts(smollm2)
    assert found.response == CHATML_PARTS["response_part"] and found.ends[0] == CHATML_PARTS["instruction_part"]
    ids, labels = labels_of(smollm2, text, **CHATML_PARTS)
    assert labels_of(smollm2, text)[1] == labels
    assert learnt(smollm2, ids, labels) == "\nSixteen.\n\n  A day.<|im_end|>\nBecause 😀<|im_end|>\n"
    assert smollm2.pad_token_id == smollm2.eos_token_id == smollm2.convert_tokens_to_ids("<|im_end|>")
    loose = {name: part.rstrip("\n") for name, part in CHATML_PARTS.items()}
    wrong = {name: part + "\n" for name, part in CHATML_PARTS.items()}
    assert learnt(smollm2, ids, labels_of(smollm2, text, **loose)[1]).startswith("\n\nSixteen")
    assert labels_of(smollm2, text, **wrong)[1] != labels
    assert labels_of(smollm2, text, **wrong, force_match=False) == labels_of(smollm2, text, **loose)


def test_thoughts_and_tools():
    tokenizer = real("qwen-3", None)
    ids, labels = labels_of(tokenizer, tokenizer.apply_chat_template(THOUGHTS, tokenize=False))
    assert learnt(tokenizer, ids, labels) == "Sixteen.<|im_end|>\n<think>\nRayleigh.\n</think>\n\nLight.<|im_end|>\n"
    for name in ("qwen-3", "llama-3.1"):
        tokenizer = real(name, None)
        ids, labels = labels_of(tokenizer, tokenizer.apply_chat_template(CALLS, tokenize=False))
        found = learnt(tokenizer, ids, labels)
        assert "look_up" not in found and '"name": "count"' in found and "Sixteen." in found and "16 eggs" not in found


def test_tokens_stand_for_the_bytes_of_their_text(smollm2):
    text = "Ducks  lay\n\n\teggs: é😀 中文 <|im_end|> <0x41>"
    for tokenizer in (smollm2, qwen(), llama3(), *map(mistral, MISTRAL_FILES)):
        piece = token_bytes(tokenizer)
        joined = b"".join(piece(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"])
        assert joined.decode().removeprefix(" ") == text


def test_packed_padded_and_masked_rows(smollm2):
    function = train_on_responses_only(None, tokenizer=smollm2, return_function=True, **CHATML_PARTS)
    ids = smollm2(rows_of(smollm2)[1]["text"], add_special_tokens=False)["input_ids"]
    (alone,) = function({"input_ids": [ids]})["labels"]
    assert function({"input_ids": [ids + ids], "seq_lengths": [[len(ids)] * 2]})["labels"] == [alone + alone]
    pad = smollm2.pad_token_id
    padded = {"input_ids": [[*ids, pad, pad]], "attention_mask": [[1] * len(ids) + [0, 0]]}
    assert function(padded)["labels"] == [[*alone, IGNORE, IGNORE]]
    answer = next(place for place, label in enumerate(alone) if label != IGNORE)
    before = [*ids]
    before[answer] = IGNORE
    (after,) = function({"input_ids": [ids], "labels": [before]})["labels"]
    assert after[answer] == IGNORE and after[answer + 1 :] == alone[answer + 1 :]


def small_model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


SETTINGS = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}


def trl_trainer(tokenizer, folder, rows, **settings):
    arguments = TrlConfig(output_dir=str(folder), **SETTINGS | settings)
    data = Dataset.from_list(rows)
    return TrlTrainer(small_model(tokenizer), args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("packing", [False, True])
def test_trls_trainer(smollm2, tmp_path, packing):
    trainer = trl_trainer(smollm2, tmp_path, rows_of(smollm2), packing=packing, padding_free=False)
    assert train_on_responses_only(trainer, **CHATML_PARTS) is trainer
    for batch in (next(iter(trainer.get_train_dataloader())), next(iter(trainer.get_eval_dataloader()))):
        labels = batch["labels"].flatten()
        kept = labels[labels != IGNORE].tolist()
        found = smollm2.decode(kept)
        assert found.count("Sixteen.") == 2 and found.count("Because") == 1 and "How many" not in found and "Why" not in found
        assert kept.count(smollm2.eos_token_id) >= 3, "EOS is padding here, and is learnt all the same"
        assert "user" not in found and "system" not in found and "assistant" not in found
    assert np.isfinite(trainer.train().training_loss)


def test_transformers_trainer_and_its_collator(smollm2, tmp_path):
    rows = [{"input_ids": smollm2(row["text"])["input_ids"]} for row in rows_of(smollm2)]
    trainer = Trainer(
        small_model(smollm2),
        args=TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=True, **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        eval_dataset={"one": Dataset.from_list(rows[:1])},
        processing_class=smollm2,
        data_collator=DataCollatorForLanguageModeling(smollm2, mlm=False),
    )
    hidden = next(iter(trainer.get_train_dataloader()))["labels"]
    assert smollm2.eos_token_id not in hidden, "this collator masks every EOS, as it is the padding"
    train_on_responses_only(trainer)
    assert isinstance(trainer.data_collator, DataCollatorForSeq2Seq)
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    assert (labels == smollm2.eos_token_id).sum() == 3
    evaluated: Any = trainer.eval_dataset
    assert "labels" in evaluated["one"].column_names
    assert np.isfinite(trainer.train().training_loss)


def test_all_masked_rows(smollm2, tmp_path, caplog):
    trainer = trl_trainer(smollm2, tmp_path, rows_of(smollm2))
    with pytest.raises(DataError) as caught:
        train_on_responses_only(trainer, instruction_part="[INST]", response_part="[/INST]")
    assert "every label of train_dataset (2 rows) is masked" in str(caught.value)
    assert "<|im_start|>user\n  How many eggs?" in str(caught.value) and "'[/INST]'" in str(caught.value)
    trainer = trl_trainer(smollm2, tmp_path, rows_of(smollm2, [TURNS, TURNS[:1], TURNS[:2]]))
    with caplog.at_level(logging.WARNING, "jaxsloth.chat_templates"):
        train_on_responses_only(trainer)
    assert "train_dataset: 1 of 3 rows hold no answer" in caplog.text and len(trainer.train_dataset) == 2


def test_what_can_not_be_masked(smollm2, tmp_path):
    with pytest.raises(DataError, match="belong together"):
        train_on_responses_only(None, instruction_part="a", tokenizer=smollm2)
    with pytest.raises(DataError, match="needs the tokenizer"):
        train_on_responses_only(None)
    headless = byte_tokenizer()
    headless.chat_template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    with pytest.raises(DataError, match=r"no header before a question or an answer.*instruction_part"):
        train_on_responses_only(None, tokenizer=headless, return_function=True)
    trainer = trl_trainer(smollm2, tmp_path, rows_of(smollm2))
    trainer.train_dataset = Dataset.from_list(rows_of(smollm2))
    with pytest.raises(DataError, match="train_dataset must be tokenized: it needs the field input_ids, and it has text"):
        train_on_responses_only(trainer)


def test_unsloths_names_and_defaults():
    parameters = inspect.signature(train_on_responses_only).parameters
    assert {name: parameter.default for name, parameter in list(parameters.items())[1:]} == {
        "instruction_part": None,
        "response_part": None,
        "force_match": True,
        "tokenizer": None,
        "return_function": False,
        "num_proc": None,
    }


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_this_projects_trainer(tmp_path, backend):
    folder = write_checkpoint(tmp_path / "model")
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), backend=backend)
    get_chat_template(tokenizer, chat_template="chatml")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = FastLanguageModel.get_peft_model(model, r=2)
    rows = rows_of(tokenizer, [TURNS] * 3 + [TURNS[:2]])
    config = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=2, max_length=256)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, eval_dataset=rows[3:], processing_class=tokenizer)
    assert trainer.examples[0].learn.all()
    assert train_on_responses_only(trainer, **CHATML_PARTS) is trainer
    held_out = trainer.held_out or []
    for example, count in ((trainer.examples[0], 2), (held_out[0], 1)):
        found = tokenizer.decode(example.tokens[example.learn])
        assert found.count("<|im_end|>\n") == count and "Sixteen" in found and "eggs" not in found
        assert "user" not in found and "assistant" not in found
    assert np.isfinite(trainer.train().training_loss)


@pytest.mark.parametrize("name", ["qwen-3", "chatml", "gemma-3"])
def test_trls_assistant_only_loss_reads_the_templates_tags(smollm2, tmp_path, name):
    tokenizer = get_chat_template(smollm2, chat_template=name)
    conversations = [TURNS, THOUGHTS]
    trainer = trl_trainer(tokenizer, tmp_path, [{"messages": messages} for messages in conversations], assistant_only_loss=True)
    template = ChatTemplate(tokenizer)
    for row, messages in zip(trainer.train_dataset, conversations, strict=True):
        tokens, learn = template.encode(Conversation(messages))
        assert row["input_ids"] == tokens.tolist()
        assert row["labels"] == np.where(learn, tokens, IGNORE).tolist()

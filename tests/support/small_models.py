"""A small random Llama on either backend, its judge by transformers and PEFT, and steps of both."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from jaxsloth.backend import BuildOptions, OptimizerOptions, load_backend
from jaxsloth.batch import IGNORE
from jaxsloth.convert.peft_adapter import write_adapter
from jaxsloth.models.registry import spec_from_config
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.measure import relative_frobenius
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora, quantize
from tests.support.decoding import random_tensors
from tests.support.sources import DictSource, examples, first_batch, stream, transformers_model
from tests.support.tiny import CONFIG, random_weights

BACKENDS = ("torch", "jax")
VOCAB = CONFIG["vocab_size"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def build(backend, changes=None, *, lora=None, nested=None, options=None, stir=True, seed=0, revise=None):
    """(a model, its spec, its weights, its adapter); lora are `add_lora`'s arguments, revise a function of the base's spec."""
    config = CONFIG | (changes or {})
    weights = random_weights(config, 1)
    base = spec_from_config(config)
    if revise is not None:
        base = revise(base)
        own = random_tensors(base)
        weights |= {name: own[name] for name in own.keys() - weights.keys()}
    if nested is not None:
        base = quantize(base, nested=nested)
    model = load_backend(backend).build(base, DictSource(weights), options or BuildOptions())
    spec = add_lora(base, **({"r": 4, "alpha": 8.0} | (lora or {})))
    values = initial_adapters(spec, "kaiming", seed, model.base_tensor)
    if stir:
        generator = np.random.Generator(np.random.Philox(5))
        values = {n: generator.normal(0, 0.1, v.shape).astype(np.float32) if "lora_B" in n else v for n, v in values.items()}
    model.add_adapters(spec, values)
    return model, spec, weights, values


def peft_model(config, weights, spec, values):
    return peft_over(transformers_model(config, weights), spec, values)


def peft_over(base, spec, values):
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "adapter", spec, values, base_model="none")
        return PeftModel.from_pretrained(base, Path(folder) / "adapter", is_trainable=True)


def judge_loss(model, batch):
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids.astype(np.int64)),
        attention_mask=torch.from_numpy((batch.segments != 0).astype(np.int64)),
    ).logits
    targets = torch.from_numpy(batch.targets.astype(np.int64))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def check_gradients(backend, changes, lora, options=None):
    model, spec, weights, values = build(backend, changes, lora=lora, options=options)
    compare_gradients(model, peft_model(CONFIG | changes, weights, spec, values))


def compare_gradients(model, judge):
    batch = first_batch(stream(examples(4, VOCAB)))
    expected = judge_loss(judge, batch)
    expected.backward()
    loss, gradients = model.gradients(batch)
    assert abs(loss - expected.item()) <= 2e-6
    found = {}
    for name, parameter in judge.named_parameters():
        if parameter.grad is not None:
            found[name.replace(".default.", ".").replace(".modules_to_save", "").replace(".default", "")] = parameter.grad
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_frobenius(gradient, found[name].numpy()) <= 1e-5, name


def losses_of(model, step_batches, steps, options=None, rate=1e-2, seed=9):
    step_function = model.step(CausalLoss(), options or OptimizerOptions(weight_decay=0.1, max_grad_norm=0.3))
    results = [step_function(step_batches.batch(s), learning_rate=rate, step=s, seed=seed) for s in range(steps)]
    return np.array([result.floats()[0] for result in results]), step_function


def six_steps(model, step_batches, options=None):
    """(the adapter and the optimizer's state after three steps, the losses of the next three by step)"""
    _, step_function = losses_of(model, step_batches, 3, options)
    adapter, state = model.trainable(), step_function.state()
    return adapter, state, later_losses(step_function, step_batches)


def later_losses(step_function, step_batches):
    return {s: step_function(step_batches.batch(s), learning_rate=1e-2, step=s, seed=9).floats()[0] for s in range(3, 6)}

"""Our module models and transformers' of the same weights, under the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import peft
import pytest
import torch

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM
from jaxsloth.models.registry import spec_from_config
from jaxsloth.transforms import quantize
from tests.support.sources import DictSource, transformers_model
from tests.support.tiny import CONFIG, random_weights

BACKENDS = ("torch", "jax")
# What short runs of trainers share, ours and the judges'.
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 3,
}


def our_base(
    backend: str, seed: int = 0, options: BuildOptions | None = None, nested: bool | None = None, **changes: Any
) -> JaxslothForCausalLM:
    """nested: of an NF4 base; None leaves it dense."""
    fields = CONFIG | changes
    spec, weights = spec_from_config(fields), random_weights(fields, seed)
    spec = spec if nested is None else quantize(spec, nested=nested)
    model = load_backend(backend).build(spec, DictSource(weights), options or BuildOptions())
    return JaxslothForCausalLM.over(model, fields, "tiny")


def lora(**changes: Any) -> peft.LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return peft.LoraConfig(task_type="CAUSAL_LM", **(settings | {"init_lora_weights": False} | changes))


def adapted(model: Any, **changes: Any) -> Any:
    """`model` under PEFT; the same seed draws the same adapters for any model."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(**changes))


def their_base() -> Any:
    return transformers_model(CONFIG, random_weights(CONFIG, 0))


def pair(backend: str, **changes: Any) -> tuple[Any, Any]:
    return adapted(our_base(backend), **changes), adapted(their_base(), **changes)


def batch(lengths: tuple[int, ...] = (37, 30, 20), left: bool = False) -> dict[str, torch.Tensor]:
    """Random rows, padded; what is padding is not scored."""
    longest = max(lengths)
    ids = torch.from_numpy(np.random.default_rng(1).integers(2, CONFIG["vocab_size"], (len(lengths), longest)))
    slots = torch.arange(longest)
    real = torch.stack([slots >= longest - length if left else slots < length for length in lengths])
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(model: Any, part: str, by: float) -> Any:
    """The model, with what it trains under names with `part` no longer the base's: by the same draws for any model."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if part in name and p.requires_grad:
                p += by * torch.randn(p.shape, generator=generator)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(batch()["input_ids"]).logits


def assert_same_passes(ours: Any, theirs: Any, scores: Iterable[Callable[[Any], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each score of the two models, and all gradients after its backward; the judge's gradients, summed over the scores."""
    expected: dict[str, torch.Tensor] = {}
    for score in scores:
        mine, judge = score(ours), score(theirs)
        assert float(mine.detach()) == pytest.approx(float(judge.detach()), rel=2e-6)
        for loss in (mine, judge):
            loss.backward()
        found, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # The floor is for keys' biases: what they add to all scores of a query cancels, and rounding does not.
            atol = 1e-5 * float(gradient.abs().max()) + 1e-8
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol)
    return expected


def losses_of_a_loop(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Of steps on batches of ever longer rows."""
    found = []
    for step in range(steps):
        loss = model(**batch((20 + step, 9))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        found.append(float(loss.detach()))
    return found

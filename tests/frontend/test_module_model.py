"""A model that is a torch module on both backends, against transformers and PEFT of the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM
from jaxsloth.models.registry import spec_from_config
from tests.support.sources import DictSource, transformers_llama
from tests.support.tiny import CONFIG, random_weights

WEIGHTS = random_weights(CONFIG, 0)
BACKENDS = ("torch", "jax")


def our_base(backend: str, **changes: Any) -> JaxslothForCausalLM:
    fields = CONFIG | changes
    weights = random_weights(fields, 0)
    model = load_backend(backend).build(spec_from_config(fields), DictSource(weights), BuildOptions())
    return JaxslothForCausalLM(LlamaConfig(**fields), model)


def lora(**changes: Any) -> peft.LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return peft.LoraConfig(task_type="CAUSAL_LM", **(settings | {"init_lora_weights": False} | changes))


def adapted(model: Any, **changes: Any) -> Any:
    """`model` under PEFT; the same seed draws the same adapters for any model."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(**changes))


def pair(backend: str, **changes: Any) -> tuple[Any, Any]:
    return adapted(our_base(backend), **changes), adapted(transformers_llama(CONFIG, WEIGHTS), **changes)


def batch(lengths: tuple[int, ...] = (37, 30, 20), left: bool = False) -> dict[str, torch.Tensor]:
    """Random rows, padded; what is padding is not scored."""
    longest = max(lengths)
    ids = torch.from_numpy(np.random.default_rng(1).integers(2, CONFIG["vocab_size"], (len(lengths), longest)))
    slots = torch.arange(longest)
    real = torch.stack([slots >= longest - length if left else slots < length for length in lengths])
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    left, right = gradients(ours), gradients(theirs)
    assert left.keys() == right.keys() and left
    for name, value in right.items():
        assert value.norm() > 0
        torch.testing.assert_close(left[name], value, rtol=0, atol=1e-5 * float(value.abs().max()) + 1e-8, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left", [False, True])
def test_loss_logits_and_gradients_are_pefts(backend, left):
    ours, theirs = pair(backend)
    rows = batch(left=left)
    positions = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    rows["position_ids"] = positions
    mine, judge = ours(**rows), theirs(**rows)
    assert abs(float(mine.loss.detach() - judge.loss.detach())) < 2e-6
    real = rows["attention_mask"].bool()
    torch.testing.assert_close(mine.logits[real], judge.logits[real], rtol=0, atol=2e-5)
    mine.loss.backward()
    judge.loss.backward()
    assert_same_gradients(ours, theirs)
    mine.logits[real].logsumexp(-1).sum().backward()
    theirs(**rows).logits[real].logsumexp(-1).sum().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_that_is_scored_is_scored_as_transformers_does(backend):
    ours, theirs = pair(backend)
    rows = batch()
    rows["labels"] = rows["input_ids"]
    assert abs(float(ours(**rows).loss.detach() - theirs(**rows).loss.detach())) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_do_not_see_each_other(backend):
    ours, theirs = pair(backend)
    ids = batch((40,))["input_ids"]
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    labels = ids.masked_fill(positions == 0, -100)
    rows = {"input_ids": ids, "position_ids": positions, "labels": labels}
    judge = theirs(**rows, use_cache=False).loss
    mine = ours(**rows).loss
    assert abs(float(mine.detach() - judge.detach())) < 2e-6
    together = ours(input_ids=ids, labels=labels).loss
    assert abs(float(mine.detach() - together.detach())) > 1e-3
    mine.backward()
    judge.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_shapes_and_counts_are_those_of_transformers(backend, capsys):
    ours, theirs = pair(backend)
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.print_trainable_parameters()
    theirs.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert (ours.device, ours.dtype) == (torch.device("cpu"), torch.float32)
    ours.to("cpu").half()


def test_no_base_weight_of_jax_is_held_in_torch():
    model = our_base("jax")
    own = [p.untyped_storage().nbytes() for name, p in model.named_parameters() if name != "lm_head.weight"]
    assert sum(own) == 4 * len(own)
    # The head's weight is JAX's own memory, seen through DLPack.
    assert model.lm_head.weight.data_ptr() == model.engine.bridge.head_weight().unsafe_buffer_pointer()


@pytest.mark.parametrize("backend", BACKENDS)
def test_disabled_and_switched_adapters(backend):
    ours, theirs = pair(backend)
    rows = {"input_ids": batch()["input_ids"]}
    for model in (ours, theirs):
        torch.manual_seed(5)
        model.add_adapter("second", lora(r=2, target_modules=["k_proj", "layers.1.mlp.up_proj"]))

    def compare() -> torch.Tensor:
        with torch.no_grad():
            mine, judge = ours(**rows).logits, theirs(**rows).logits
        torch.testing.assert_close(mine, judge, rtol=0, atol=2e-5)
        return mine

    first = compare()
    with ours.disable_adapter(), theirs.disable_adapter():
        off = compare()
    ours.set_adapter("second")
    theirs.set_adapter("second")
    second = compare()
    assert (first - off).abs().max() > 1e-2 < (second - first).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_step_between_forward_and_backward_raises(backend):
    ours = adapted(our_base(backend))
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    early, late = ours(**batch()).loss, ours(**batch()).loss
    late.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()

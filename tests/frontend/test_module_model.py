"""A model that is a torch module on both backends, against transformers and PEFT of the same weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from trl.trainer.utils import hash_module

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM
from jaxsloth.frontend.module.peft_adoption import PeftFeatureError
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.transforms import quantize
from tests.support.modules import BACKENDS, adapted, batch, lora, our_base, pair, their_base
from tests.support.sources import DictSource, transformers_model
from tests.support.tiny import CONFIG, random_weights


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
    assert model.lm_head.weight.data_ptr() == model.engine.bridge.base_weight("lm_head").unsafe_buffer_pointer()


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (lambda m: adapted(m, use_dora=True, init_lora_weights=True), "DoraLinearVariant"),
        (lambda m: adapted(m, modules_to_save=["norm"]), "norm was replaced by a ModulesToSaveWrapper"),
        (lambda m: adapted(m, target_modules=["q_proj", "embed_tokens"]), "model.embed_tokens was replaced"),
        (lambda m: adapted(m, target_modules=["q_proj", "lm_head"]), "lm_head was replaced"),
        (lambda m: adapted(m, trainable_token_indices=[3, 4]), "model.embed_tokens was replaced"),
        (lambda m: adapted(m, lora_bias=True), "lora_bias"),
        (lambda m: peft.get_peft_model(m, peft.IA3Config(task_type="CAUSAL_LM")), "ia3"),
        (
            lambda m: peft.get_peft_model(m, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "prompt tuning does",
        ),
    ],
    ids=["dora", "modules_to_save", "embedding", "head", "tokens", "lora_bias", "ia3", "prompt"],
)
def test_what_is_not_plain_lora_is_refused(backend, wrap, reason):
    with pytest.raises((ValueError, RuntimeError), match=reason):
        wrap(our_base(backend))(**batch())


def test_inits_that_change_the_base_and_parameters_in_its_place_are_refused():
    with pytest.raises(RuntimeError, match="can't be written"):
        adapted(our_base("jax"), init_lora_weights="pissa")(**batch())
    replaced = our_base("jax")
    replaced.get_submodule("model.layers.1.mlp.up_proj").weight = torch.nn.Parameter(torch.zeros(128, 64), requires_grad=False)
    with pytest.raises(PeftFeatureError, match=r"layers.1.mlp.up_proj.weight was replaced"):
        adapted(replaced)(**batch())


def test_hooks_that_would_never_be_called_and_training_the_base_are_refused():
    model = adapted(our_base("jax"))
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(PeftFeatureError, match="has a hook"):
        model(**batch())
    model = adapted(our_base("jax"))
    model.enable_input_require_grads()  # Trainers do, with gradient checkpointing; it asks for nothing here.
    model(**batch())
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(PeftFeatureError, match=r"model.norm.weight requires a gradient"):
        model(**batch())
    with pytest.raises(NotImplementedError, match="save the adapter"):
        our_base("jax").save_pretrained("anywhere")


def test_inputs_that_would_be_ignored_are_refused():
    model, rows = our_base("jax"), batch()
    with pytest.raises(ValueError, match="output_attentions"):
        model(**rows, output_attentions=True)
    with pytest.raises(ValueError, match=r"seq_idx .* without position_ids"):
        model(**rows, seq_idx=rows["input_ids"])
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(rows["input_ids"], torch.ones(3, 1, 37, 37))
    with pytest.raises(ValueError, match="labels must be"):
        model(rows["input_ids"], labels=rows["labels"][:, 1:])
    with pytest.raises(ValueError, match=r"\[batch, length\]"):
        model(rows["input_ids"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_rank_and_checkpointing_settings(backend):
    changes = {"use_rslora": True, "rank_pattern": {"layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    ours, theirs = pair(backend, **changes)
    ours.train().base_model.model.gradient_checkpointing_enable()
    assert ours.base_model.model.is_gradient_checkpointing
    mine, judge = ours(**batch()).loss, theirs.train()(**batch()).loss
    assert abs(float(mine.detach() - judge.detach())) < 2e-6
    with ours.disable_adapter(), torch.no_grad():  # between forward and backward, as DPO's reference comes
        ours(**batch())
    mine.backward()
    judge.backward()
    assert_same_gradients(ours, theirs)


def test_a_scaling_of_zero_turns_the_first_adapter_off():
    ours, theirs = pair("torch")
    for one in (ours, theirs):
        next(module for module in one.modules() if hasattr(module, "lora_A")).scaling["default"] = 0.0
    ids = batch()["input_ids"][:1, :8]
    answers = [one.eval().generate(ids, max_new_tokens=8, do_sample=False).tolist() for one in (ours, theirs)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_drawn_from_torchs_seed(backend):
    ours, theirs = pair(backend, lora_dropout=0.3)
    still = ours(**batch()).loss
    ours.train(), theirs.train()

    def loss(seed: int, model: Any = ours) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(**batch()).loss

    first = loss(1)
    assert first.item() == loss(1).item() != loss(2).item()
    # The draws are others than PEFT's, and so much dropout raises the loss by as much as PEFT's does (0.14, ± 0.012 each).
    mine, judge = (np.mean([loss(seed, model).item() for seed in range(40)]) - still.item() for model in (ours, theirs))
    assert 0.08 < judge < 0.2 and abs(mine - judge) < 0.06
    # The gradient is that of the very mask: a small step along it lowers the loss of the same draw by its squared norm.
    first.backward()
    trained = [p for p in ours.parameters() if p.requires_grad]
    square, step = sum(float(p.grad.square().sum()) for p in trained), 1e-3
    with torch.no_grad():
        for p in trained:
            p -= step * p.grad
    assert (first.item() - loss(1).item()) / step == pytest.approx(square, rel=0.05)
    ours.eval()
    assert ours(**batch()).loss.item() != still.item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_answers_are_transformers(backend):
    ours, theirs = pair(backend)
    rows = {name: value[:, :12] for name, value in batch((12, 9), left=True).items() if name != "labels"}
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(ours.generate(**rows, **settings), theirs.generate(**rows, **settings))
    assert torch.equal(ours.generate(**rows, **settings, use_cache=True), theirs.generate(**rows, **settings))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(backend):
    ours, theirs = (model.train() for model in pair(backend))
    rows = batch()
    judge = theirs(**rows)
    output = ours(**rows)
    assert set(output.keys()) == {"loss"}  # no logits until they are read
    torch.testing.assert_close(output.logits, judge.logits, rtol=0, atol=2e-5)
    stale = ours(**rows)
    with torch.no_grad():
        next(p for p in ours.parameters() if p.requires_grad).add_(1.0)
    with pytest.raises(RuntimeError, match="adapters were written"):
        _ = stale.logits
    ours.eval()
    theirs.load_state_dict({n: p for n, p in ours.state_dict().items() if "lora_" in n}, strict=False)
    with torch.no_grad():
        scored = ours(**rows)
        assert abs(float(scored.loss - theirs(**rows).loss)) < 2e-6 and scored.logits.shape == (3, 37, 260)
        last = ours(rows["input_ids"], logits_to_keep=2).logits
        torch.testing.assert_close(last, theirs(rows["input_ids"]).logits[:, -2:], rtol=0, atol=2e-5)
        loss, logits = ours(**rows, return_dict=False)
        assert loss == scored.loss and torch.equal(logits, scored.logits)


def test_copies_share_the_base_and_own_their_adapters():
    model = adapted(our_base("jax"))
    twin = copy.deepcopy(model)
    before = model(**batch()).loss
    assert twin(**batch()).loss == before
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert twin(**batch()).loss != before == model(**batch()).loss
    assert sum(p.untyped_storage().nbytes() for n, p in twin.named_parameters() if "lora" not in n and "head" not in n) < 1000
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(model)


def test_saved_adapters_are_pefts(tmp_path):
    ours, theirs = pair("jax")
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(their_base(), str(tmp_path))
    again = peft.PeftModel.from_pretrained(our_base("torch"), str(tmp_path))
    expected = theirs(**batch()).loss.detach()
    for model in (loaded, again):
        assert abs(float(model(**batch()).loss.detach() - expected)) < 2e-6


def test_bases_that_differ_have_other_placeholders():
    """TRL keys cached reference log-probabilities by a hash of the state_dict."""
    first, second = our_base("jax"), our_base("jax", seed=1)
    assert hash_module(first) == hash_module(our_base("jax")) != hash_module(second)
    second.lm_head.weight = first.lm_head.weight
    assert hash_module(first) != hash_module(second)


def test_few_programs_are_compiled():
    model = adapted(our_base("jax"))
    engine = model.base_model.model.engine.model
    for length in range(70, 97, 3):
        rows = batch((length, 5))
        model(**rows).loss.backward()
    assert engine.compilations() == 1
    with model.disable_adapter(), torch.no_grad():
        model(rows["input_ids"])
    assert engine.compilations() == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_nf4_and_tied_bases(backend, capsys):
    fields = CONFIG | {"tie_word_embeddings": True}
    engine = load_backend(backend).build(
        quantize(spec_from_config(fields), nested=True), DictSource(random_weights(fields, 0)), BuildOptions()
    )
    weights = {name: engine.base_tensor(name) for name in tensor_shapes(engine.spec)}
    ours = adapted(JaxslothForCausalLM.over(engine, fields, "tiny"))
    theirs = adapted(transformers_model(fields, weights))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    mine, judge = ours(**batch()).loss, theirs(**batch()).loss
    assert abs(float(mine.detach() - judge.detach())) < 2e-6
    mine.backward()
    judge.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_of_ones_own_under_accelerate(backend):
    """Clipping, another optimizer, accumulation by hand and autocast, which asks for nothing here: float32 stays."""

    def losses(model: Any) -> list[float]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.NAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        found = []
        for step in range(6):
            with accelerator.accumulate(model):
                loss = model(**batch((20 + step, 9))).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                found.append(float(loss.detach()))
        return found

    ours, theirs = pair(backend)
    expected = losses(theirs)
    assert losses(ours) == pytest.approx(expected, abs=1e-5) and expected[-1] < expected[0] - 0.1
    with torch.autocast("cpu", torch.bfloat16):
        under = ours(**batch()).loss.item()
    assert under == ours(**batch()).loss.item()

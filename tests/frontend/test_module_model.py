"""A model that is a torch module on both backends, against transformers and PEFT of the same weights."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.utils import TransformersKwargs
from trl.trainer.utils import hash_module

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.frontend import arguments
from jaxsloth.frontend.module import inputs
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
def test_packed_documents_do_not_see_each_other_where_transformers_tells_them_apart(backend, monkeypatch):
    """Without a mask, and without a cache: the config's use_cache counts where nobody says."""
    ours, theirs = pair(backend)
    ids = batch((40,))["input_ids"]
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    labels = ids.masked_fill(positions == 0, -100)
    rows = {"input_ids": ids, "position_ids": positions, "labels": labels}
    losses = []
    for cached in (False, True, None):
        monkeypatch.setattr(arguments, "_said", set())
        judge = theirs(**rows, use_cache=cached).loss
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses.append(ours(**rows, use_cache=cached).loss)
        assert abs(float(losses[-1].detach() - judge.detach())) < 2e-6
        assert any("begin anew within a row" in str(warning.message) for warning in said) == (cached is not False)
    for model in (ours, theirs):
        monkeypatch.setattr(model.config, "use_cache", False)
    judge = theirs(**rows).loss
    assert abs(float(ours(**rows).loss.detach() - judge.detach())) < 2e-6
    together = ours(input_ids=ids, labels=labels).loss
    assert min(abs(float(losses[0].detach() - other.detach())) for other in (losses[1], together)) > 1e-3
    losses[0].backward()
    judge.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoding_loop_of_ones_own_goes_on_where_it_ended(backend):
    """With padded rows, positions of its own, several tokens at once, tokens taken back, rows in another order, a copy."""

    def answers(model: Any, cached: bool | None, positions: bool) -> list[torch.Tensor]:
        rows = {name: value[:, :12] for name, value in batch((12, 9), left=True).items()}
        ids, mask, found, past = rows["input_ids"], rows["attention_mask"], [], None
        for step in range(5):
            where = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]} if positions else {}
            labels = {"labels": rows["labels"]} if step == 0 else {}
            with torch.no_grad():
                out = model(ids, attention_mask=mask, past_key_values=past, use_cache=cached, **where, **labels)
            past = copy.deepcopy(out.past_key_values)
            assert past.get_seq_length() == mask.shape[1]
            found.append(out.logits[:, -1])
            ids = out.logits[:, -1:].argmax(-1) if step != 2 else torch.tensor([[7, 8, 9], [4, 5, 6]])
            if step == 3:
                past.crop(-2)
                mask = mask[:, :-2]
                past.reorder_cache(torch.tensor([1, 0]))
                mask, ids = mask[[1, 0]], ids[[1, 0]]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return found

    ours, theirs = (model.eval() for model in pair(backend))
    for cached, positions in ((None, False), (True, True)):
        for mine, judge in zip(answers(ours, cached, positions), answers(theirs, cached, positions), strict=True):
            torch.testing.assert_close(mine, judge, rtol=0, atol=2e-5)
    ids = batch()["input_ids"][:1]
    with torch.no_grad():
        past = [model(ids[:, :9]).past_key_values for model in (ours, theirs)]
        both = list(zip((ours, theirs), past, strict=True))
        more = [model(ids[:, 9:12], past_key_values=kept, labels=ids[:, 9:12]) for model, kept in both]
        assert more[0].logits.shape == (1, 3, 260) and abs(float(more[0].loss - more[1].loss)) < 2e-6
        hidden = [model.base_model.model.model(ids[:, 12:14], past_key_values=kept)[0] for model, kept in both]
        torch.testing.assert_close(*hidden, rtol=0, atol=2e-5)
        assert ours(ids, use_cache=False).past_key_values is None
        settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
        went_on = [model.generate(ids, past_key_values=kept, **settings) for model, kept in both]
        assert torch.equal(*went_on)
    ours.train().base_model.model.model.gradient_checkpointing = True
    assert ours(ids).past_key_values is None  # as in transformers


WRONG_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "bidirectional": ({"is_causal": False}, r"is_causal=False \(of forward, or in the model's config\)"),
    "hidden states": ({"output_hidden_states": True}, r"forward got output_hidden_states \(bool\)"),
    "attentions": ({"output_attentions": True}, r"forward got output_attentions \(bool\)"),
    "a cache of transformers": ({"past_key_values": DynamicCache()}, r"past_key_values \(DynamicCache\).*leave it out of the"),
    "ids of floats": ({"input_ids": torch.tensor([[5.7, 6.2]])}, r"input_ids must be whole numbers .*got torch.float32"),
    "labels of floats": ({"labels": torch.tensor([[5.7, 6.2]])}, "labels must be whole numbers"),
    "positions of floats": ({"position_ids": torch.tensor([[0.0, 0.5]])}, "position_ids must be whole numbers"),
    "positions of another length": ({"position_ids": torch.arange(3)[None]}, r"position_ids must be \(1, 2\) like input_ids"),
    "masks by kind": (
        {"attention_mask": {"full_attention": None}},
        r"attention_mask must be \(1, 2\) like input_ids, got dict",
    ),
    "a mask of four": ({"attention_mask": torch.ones(1, 1, 2, 2)}, r"like input_ids, got \(1, 1, 2, 2\)"),
    "an ignored label": ({"ignore_index": 0}, "forward got ignore_index"),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_would_change_the_answer_is_had_or_refused(backend, monkeypatch):
    """Every keyword of transformers' forward (TransformersKwargs), given or asked for in the config."""
    ours, theirs = (model.eval() for model in pair(backend))
    given: dict[str, Any] = {"input_ids": torch.tensor([[5, 6]])}
    for door in (ours, ours.base_model.model.model):
        for settings, message in WRONG_INPUTS.values():
            if "labels" not in settings or door is ours:
                with pytest.raises(ValueError, match=message):
                    door(**given | settings)
    base = ours.base_model.model  # PEFT's forward hands on None, which counts in transformers too
    for name, value in (("is_causal", False), ("output_hidden_states", True)):
        monkeypatch.setattr(base.config, name, value, raising=False)
        for door in (base, base.model):
            with pytest.raises(ValueError, match=name):
                door(**given)
        monkeypatch.setattr(base.config, name, not value)
        assert base(**given, is_causal=True).logits is not None
    rows = batch()
    chosen = torch.tensor([[1, 30], [0, 4], [7, 7]])
    with torch.no_grad():
        for keep in (chosen[0], chosen, rows["attention_mask"].bool(), 2):
            mine, judge = (model(rows["input_ids"], logits_to_keep=keep).logits for model in (ours, theirs))
            torch.testing.assert_close(mine, judge, rtol=0, atol=2e-5)
    known = {
        "num_items_in_batch",
        "output_router_logits",
        "position_ids",
        "is_causal",
        "output_hidden_states",
        "output_attentions",
    }
    assert set(TransformersKwargs.__annotations__) == known | inputs._PACKING  # a new one is looked at


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_shapes_and_counts_are_those_of_transformers(backend, capsys, monkeypatch):
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
    before = ours(**batch(), use_cache=False).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.to("cpu").float()
    monkeypatch.setattr(arguments, "_said", set())
    for cast in (lambda: ours.half(), lambda: ours.to(torch.bfloat16), lambda: ours.double()):
        with pytest.warns(UserWarning, match=r"casts adapters alone: the base computes in torch.float32"):
            cast()
    assert ours(**batch(), use_cache=False).loss.dtype == before.dtype == torch.float32


def test_no_base_weight_of_jax_is_held_in_torch():
    model = our_base("jax")
    own = [p.untyped_storage().nbytes() for name, p in model.named_parameters() if name != "lm_head.weight"]
    assert sum(own) == 4 * len(own)
    # The head's weight is JAX's own memory, seen through DLPack.
    assert model.lm_head.weight.data_ptr() == model.engine.functional.base_weight("lm_head").unsafe_buffer_pointer()


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
    assert set(output.keys()) == {"loss", "past_key_values"}  # no logits until they are read
    torch.testing.assert_close(ours(**rows)[1], judge[1], rtol=0, atol=2e-5)
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
        for mine, their in ((ours(**rows, return_dict=False), theirs(**rows, return_dict=False)), (scored.to_tuple(), judge)):
            assert len(mine) == len(their) == 3
            assert mine[0] == scored.loss and torch.equal(mine[1], scored.logits)
    loss, logits, _ = ours(**rows, return_dict=False)
    assert loss.requires_grad and logits.shape == (3, 37, 260)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_comes_in_by_no_door(backend, wrong, tmp_path):
    ours = adapted(our_base(backend), modules_to_save=["lm_head"])
    ours.save_pretrained(tmp_path)
    whole, own = load_file(tmp_path / "adapter_model.safetensors"), ours.state_dict()
    for part in ("lora_B", "lm_head"):
        name = next(name for name in whole if part in name)
        values = whole | {name: whole[name].index_fill(0, torch.tensor([1]), wrong)}
        save_file(values, tmp_path / "adapter_model.safetensors")
        message = rf"{part}.* must hold finite values, got \d+ others, the first {wrong}"
        for door in (
            lambda: peft.PeftModel.from_pretrained(our_base(backend), str(tmp_path)),
            lambda: ours.load_adapter(str(tmp_path), "another"),
            lambda: peft.set_peft_model_state_dict(ours, values),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=message):
                door()
        name = next(key for key in own if part in key and "default" in key)
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(own | {name: torch.full_like(own[name], wrong)})
    ours.load_state_dict(own, strict=False)  # the other that was refused stays as it was made


def test_repeated_layers_are_refused():
    ours = peft.get_peft_model(our_base("torch"), lora(layer_replication=[[0, 2], [1, 4]]))
    with pytest.raises(PeftFeatureError, match=r"model\.layers\.2\.\w+ is model\.layers\.1\.\w+.*layers swapped or shared"):
        ours(**batch())


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

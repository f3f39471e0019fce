"""The written pass of the JAX backend gives autograd's loss and gradients, whatever is kept, formed again, or left to a vjp.

The kernels run in Pallas' interpreter here.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsloth.backend import BuildOptions
from jaxsloth.batch import Batch
from jaxsloth.jax_backend import mlp, placement
from jaxsloth.jax_backend.plan import make_plan
from jaxsloth.jax_backend.train_step import summed_loss
from jaxsloth.kernels.dropout.contract import step_words
from jaxsloth.models.memory import FILLED, activation_bytes
from jaxsloth.parity.measure import relative_frobenius
from tests.support.decoding import VARIANTS
from tests.support.small_models import LLAMA3, VOCAB, build, check_gradients
from tests.support.sources import examples, first_batch, stream

FUSED = {"train_pass": "fused"}
WIDTHS = {"num_hidden_layers": 2, "intermediate_size": 128}
BAR = 3e-5  # sums of another order; a wrong term is worth 1e-2 and more


def slow(*values: object) -> object:
    """A parameter for the slow tests: each compiles two interpreted programs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def masked_gradients(model, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """As `Model.gradients`, with the dropout masks of a step."""
    frequencies, ropes = model.frequencies(64)
    plan, _ = make_plan(model.mode, model.unrolled, batch.targets[None], batch.segments[None], 1)
    arrays = tuple(map(jnp.asarray, (batch.input_ids, batch.targets, batch.segments, batch.positions, batch.rows)))
    words = jnp.array(step_words(3, 5), jnp.uint32)

    def loss(trained):
        return summed_loss(model.structure, trained, model.frozen, (ropes, frequencies), arrays, words, plan)

    value, gradients = jax.jit(jax.value_and_grad(loss))(model.trained)
    return float(value), model.unstack(gradients)


def compare(batch: Batch, mode: str = "none", changes=None, loop: str = "scan", **how) -> float:
    """The largest difference of a gradient from autograd's; the loss is asserted here."""
    changes = WIDTHS | (changes or {})
    judge, *_ = build("jax", changes, **how)
    options = BuildOptions(gradient_checkpointing=mode, implementations=FUSED | {"layer_loop": loop})
    model, *_ = build("jax", changes, options=options, **how)
    if how.get("lora", {}).get("dropout"):
        (expected, theirs), (loss, ours) = masked_gradients(judge, batch), masked_gradients(model, batch)
    else:
        (expected, theirs), (loss, ours) = judge.gradients(batch), model.gradients(batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert any(gradient.any() for gradient in theirs.values())
    return max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items() if gradient.any())


@pytest.fixture
def small_tiles(monkeypatch):
    """256 tokens make three tiles, the last of them short. The size is no argument of the programs: those of other tiles are
    forgotten before, and these after."""
    monkeypatch.setattr(mlp, "MLP_TILE", 256 * 100)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("mode", ["none", slow("selective"), slow("full")])
def test_every_mode(mode):
    assert compare(first_batch(stream(examples(4, VOCAB))), mode) <= BAR


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"rope_parameters": LLAMA3}],
)
def test_every_variant(changes):
    assert compare(first_batch(stream(examples(4, VOCAB))), "selective", changes) <= BAR


@pytest.mark.parametrize("nested", [slow(False), True])
def test_quantized_bases(nested):
    assert compare(first_batch(stream(examples(4, VOCAB))), nested=nested) <= BAR


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"targets": ["q_proj", "v_proj"]}, {"targets": ["model.layers.1.mlp.down_proj"]}])
def test_some_layers_without_adapters(lora):
    assert compare(first_batch(stream(examples(4, VOCAB))), lora=lora) <= BAR


@pytest.mark.parametrize(
    ("mode", "lora"),
    [
        ("none", {"r": 22, "alpha": 8.0}),
        ("selective", {"r": 64, "alpha": 32.0, "targets": ["q_proj", "v_proj"]}),
        slow("full", {"r": 8, "alpha": 64.0, "targets": ["o_proj", "gate_proj"]}),
        slow("none", {"r": 32, "alpha": 16.0, "targets": ["q_proj", "down_proj"]}),
        slow("selective", {"r": 64, "alpha": 16.0}),
    ],
)
def test_ranks_are_pefts(mode, lora):
    """Rooms of none, one, two and three times 64 columns."""
    check_gradients("jax", WIDTHS, lora, BuildOptions(gradient_checkpointing=mode, implementations=FUSED))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["scan", "unrolled"])
def test_ranks_over_quantized_bases_and_tiles(loop, small_tiles):
    lora = {"r": 32, "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "model.layers.1.mlp.down_proj"]}
    assert compare(first_batch(stream(examples(4, VOCAB))), "selective", nested=True, lora=lora, loop=loop) <= BAR


@pytest.mark.slow
def test_tiles_of_tokens(small_tiles, monkeypatch):
    found, tiles = [], mlp.Mlp._tiles
    monkeypatch.setattr(mlp.Mlp, "_tiles", lambda *given: found.append(tiles(*given)) or found[-1])
    assert compare(first_batch(stream(examples(4, VOCAB))), "selective") <= BAR
    assert [len(each) for each in found] == [3, 3]  # forward and backward


def test_packed_documents():
    batch = first_batch(stream(examples(8, VOCAB), packing=True))
    assert batch.segments.max() > 1
    assert compare(batch) <= BAR


def written(model, index: int = 0) -> dict[str, str | None]:
    return model.decoder().model.layers[index].passes()


# What is asked of it, and why attention and MLP then take a local vjp (None: they stay written).
BODIES = {
    "dropout": ({"lora": {"dropout": 0.1}}, "LoRA dropout", "LoRA dropout"),
    "rank": ({"lora": {"r": 257}}, "ranks of 768 in all, and .* have 771", None),
    "erf": ({"changes": {"hidden_act": "gelu"}}, None, "erf"),
    "biases": ({"changes": {"attention_bias": True, "mlp_bias": True}, "lora": {"bias": "all"}}, None, None),
    "embedding": ({"lora": {"modules_to_save": ["embed_tokens", "lm_head"], "targets": ["q_proj"]}}, None, None),
    "qk_norm": ({"revise": VARIANTS["qk_norm"]}, None, None),
    "sandwich": ({"revise": VARIANTS["sandwich"]}, None, None),
    "unnormed": ({"revise": VARIANTS["unnormed"]}, None, None),
    "no_rope": ({"revise": VARIANTS["no_rope"]}, None, None),
    "gemma": (
        {"revise": lambda spec: VARIANTS["sandwich"](VARIANTS["qk_norm"](spec)), "lora": {"dropout": 0.1}},
        "drop",
        "drop",
    ),
}


def matches(found: str | None, reason: str | None) -> bool:
    return found is None if reason is None else found is not None and re.search(reason, found) is not None


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("dropout", "selective"),
        ("qk_norm", "full"),
        ("sandwich", "selective"),
        ("biases", "none"),
        slow("rank", "full"),
        slow("erf", "none"),
        slow("embedding", "full"),
        slow("qk_norm", "none"),
        slow("sandwich", "none"),
        slow("unnormed", "selective"),
        slow("no_rope", "full"),
        slow("gemma", "offload"),
    ],
)
def test_every_body_trains(name, mode):
    """A reason is a body's: the other one stays written, and both give autograd's gradients."""
    how, attention, mlp = BODIES[name]
    changes = {"num_hidden_layers": 2, "intermediate_size": 64} | how.get("changes", {})
    how = {key: value for key, value in how.items() if key != "changes"}
    model, *_ = build("jax", changes, **how)
    passes = written(model)
    assert matches(passes["self_attn"], attention) and matches(passes["mlp"], mlp), passes
    assert compare(first_batch(stream(examples(4, VOCAB))), mode, changes, **how) <= BAR


@pytest.mark.parametrize(
    ("asked", "attention", "mlp"),
    [
        ({"rope": "xla"}, "rope: xla was asked for", None),
        ({"gated_activation": "xla"}, None, "gated_activation: xla was asked for"),
        ({"lora_matmul": "xla"}, "lora_matmul: xla was asked for", "lora_matmul: xla was asked for"),
    ],
)
def test_an_implementation_that_is_asked_for_runs_in_the_written_pass(asked, attention, mlp):
    model, *_ = build("jax", WIDTHS, options=BuildOptions(implementations=FUSED | asked))
    assert written(model) == {"self_attn": attention, "mlp": mlp}


def test_the_mode_follows_what_is_asked_for(monkeypatch):
    """What was chosen first must not outlast another request, nor "auto" a micro-batch that needs more."""
    model, *_ = build("jax", WIDTHS, options=BuildOptions(implementations=FUSED))
    assert model.mode(64) == "none"
    model.set_gradient_checkpointing("full")
    assert model.mode(64) == "full"
    model.set_gradient_checkpointing("auto")
    need = activation_bytes(model.spec, "none", 1000, 4, attends_once=True)
    monkeypatch.setattr(placement, "free_memory", lambda: need / FILLED + 1)
    assert [model.mode(tokens) for tokens in (1000, 10, 1100, 1000)] == ["none", "none", "selective", "selective"]


def test_evaluations_have_no_say_in_the_mode(monkeypatch):
    options = BuildOptions(gradient_checkpointing="auto", implementations=FUSED)
    model, *_ = build("jax", WIDTHS | {"intermediate_size": 64, "num_hidden_layers": 1}, options=options)
    batch = first_batch(stream(examples(4, VOCAB)))
    tokens = batch.input_ids.size
    need = activation_bytes(model.spec, "none", tokens // 2, 4, attends_once=True)
    monkeypatch.setattr(placement, "free_memory", lambda: need / FILLED + 1)
    evaluate = model.eval_step()
    evaluate(batch)
    assert model.mode(tokens // 2) == "none"
    evaluate(batch)
    assert model.mode(tokens // 2) == "none"
    assert model.mode(tokens) != "none"

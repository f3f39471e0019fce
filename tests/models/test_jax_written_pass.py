"""The written pass of the JAX backend gives autograd's loss and gradients, whatever is kept, formed again, or left to a vjp.

The kernels run in Pallas' interpreter here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsloth.backend import BuildOptions
from jaxsloth.batch import Batch
from jaxsloth.jax_backend import attention, devices, linear, mlp, norm, written_pass
from jaxsloth.jax_backend.linear import TRAINED
from jaxsloth.jax_backend.ops import Ops
from jaxsloth.jax_backend.plan import Checkpointing, ProgramPlan, make_plan
from jaxsloth.jax_backend.step import summed_loss
from jaxsloth.kernels.dropout.contract import step_key
from jaxsloth.kernels.registry import RefusedError, Target
from jaxsloth.models.memory import FILLED
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.parity.measure import relative_frobenius
from tests.support.decoding import VARIANTS
from tests.support.lowering import lowered_for_cuda
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
    plan, _ = make_plan(model.checkpointing, model.unrolled, batch.targets[None], batch.segments[None], 1)
    arrays = tuple(map(jnp.asarray, (batch.input_ids, batch.targets, batch.segments, batch.positions, batch.rows)))
    words = jnp.array(step_key(3, 5), jnp.uint32)

    def loss(trained):
        return summed_loss(model.structure, trained, model.frozen, (ropes, frequencies), arrays, words, plan, CausalLoss())

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
    "dropout": ({"lora": {"dropout": 0.1}}, None, None),
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
        None,
        None,
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


def test_a_run_says_how_each_kind_of_block_is_trained(caplog):
    model, *_ = build("jax", WIDTHS | {"hidden_act": "gelu"}, options=BuildOptions(implementations=FUSED))
    with caplog.at_level("INFO", "jaxsloth.jax_backend"):
        model.checkpointing(64)
        model.checkpointing(128)
    assert caplog.messages == ["training pass, 2 blocks: self_attn: written; mlp: local vjp (no kernel has erf)"]


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


def mode(model, tokens: int) -> str:
    return model.checkpointing(tokens).mode


def needs(model, tokens: int) -> dict[str, float]:
    return model.needs(model.decoder().model.layers, tokens)


def test_the_mode_follows_what_is_asked_for(monkeypatch):
    """What was chosen first must not outlast another request, nor "auto" a micro-batch that needs more."""
    model, *_ = build("jax", WIDTHS, options=BuildOptions(implementations=FUSED))
    assert mode(model, 64) == "none"
    model.set_gradient_checkpointing("full")
    assert mode(model, 64) == "full"
    model.set_gradient_checkpointing("auto")
    free = needs(model, 1000)["none"] / FILLED + 1
    monkeypatch.setattr(devices, "free_memory", lambda: free)
    assert [mode(model, tokens) for tokens in (1000, 10, 1100, 1000)] == ["none", "none", "selective", "selective"]


def test_evaluations_have_no_say_in_the_mode(monkeypatch):
    options = BuildOptions(gradient_checkpointing="auto", implementations=FUSED)
    model, *_ = build("jax", WIDTHS | {"intermediate_size": 64, "num_hidden_layers": 1}, options=options)
    batch = first_batch(stream(examples(4, VOCAB)))
    tokens = batch.input_ids.size
    free = needs(model, tokens // 2)["none"] / FILLED + 1
    monkeypatch.setattr(devices, "free_memory", lambda: free)
    evaluate = model.eval_step()
    evaluate(batch)
    assert mode(model, tokens // 2) == "none"
    evaluate(batch)
    assert mode(model, tokens // 2) == "none"
    assert mode(model, tokens) != "none"


def kept_arrays(model, name: str, tokens: int) -> int:
    """Elements a token that the written pass keeps of all blocks, from the shapes of what it returns."""
    decoder = model.decoder()
    structure, trained, frozen = nnx.split(decoder.model.layers, TRAINED, ...)
    frequencies, ropes = model.frequencies(tokens)
    numbers = jnp.zeros((1, tokens), jnp.int32)
    run = replace(decoder.run(numbers, numbers, ropes, frequencies), unpacked=True, stream_pad=decoder.stream_pad())
    count = len(model.spec.layers) // len(decoder.model.layers)
    config = written_pass.StackConfig(structure, count, name, False, False)
    x = jax.ShapeDtypeStruct((tokens, model.spec.hidden), jnp.float32)
    kept = jax.eval_shape(partial(written_pass._forward, config, mode=name), trained, x, frozen, run)[1]
    return sum(leaf.size for leaf in jax.tree.leaves(kept)) // tokens


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", ["dense", "qk_norm", "sandwich", "two_ropes"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_declared_to_be_kept_is_kept(variant, checkpointing, dropout):
    """`auto` chooses by these declarations; norms' reciprocals, at most two a branch, are left out."""
    model, *_ = build("jax", WIDTHS, revise=VARIANTS[variant], lora={"dropout": dropout}, options=BuildOptions())
    blocks = model.decoder().model.layers
    declared = sum(block.kept_widths(checkpointing) for block in blocks) * len(model.spec.layers) // len(blocks)
    assert 0 <= kept_arrays(model, checkpointing, 64) - declared <= 4 * len(model.spec.layers)


@pytest.mark.parametrize(
    ("wanted", "platform", "free", "found"),
    [
        ("auto", "cpu", "inf", "none"),
        ("auto", "cuda", "0", "full"),
        ("offload", "cpu", "inf", "offload"),
        ("offload", "cuda", "inf", RefusedError),
        ("selective", "cuda", "inf", "selective"),
    ],
)
def test_autograd_keeps_what_is_asked_for_or_refuses(monkeypatch, wanted, platform, free, found):
    options = BuildOptions(gradient_checkpointing=wanted, implementations={"train_pass": "autograd"})
    model, *_ = build("jax", WIDTHS, options=options)
    monkeypatch.setattr("jaxsloth.jax_backend.state.platform", lambda: platform)
    monkeypatch.setattr(devices, "free_memory", lambda: float(free))
    if found is RefusedError:
        with pytest.raises(RefusedError, match="offload is a way of the written training pass"):
            model.checkpointing(64)
    else:
        assert model.checkpointing(64) == Checkpointing(False, found)


def test_autograds_selective_keeps_the_linear_layers_outputs():
    """Less than none, more than full: counted in the program's memory."""
    batch, sizes = first_batch(stream(examples(4, VOCAB))), {}
    for name in ("none", "selective", "full"):
        model, *_ = build("jax", WIDTHS, options=BuildOptions(gradient_checkpointing=name))
        frequencies, ropes = model.frequencies(64)
        plan, _ = make_plan(model.checkpointing, model.unrolled, batch.targets[None], batch.segments[None], 1)
        arrays = tuple(map(jnp.asarray, (batch.input_ids, batch.targets, batch.segments, batch.positions, batch.rows)))

        def loss(trained, model=model, ropes=ropes, frequencies=frequencies, arrays=arrays, plan=plan):
            return summed_loss(model.structure, trained, model.frozen, (ropes, frequencies), arrays, None, plan, CausalLoss())

        kept = jax.eval_shape(lambda trained, loss=loss: jax.vjp(loss, trained)[1], model.trained)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(kept))
    assert sizes["full"] < sizes["selective"] < sizes["none"]


def test_a_request_that_nothing_would_follow_is_refused():
    with pytest.raises(RefusedError, match="op nf4_dequantize has no implementation 'triton' for jax"):
        build("jax", options=BuildOptions(implementations={"nf4_dequantize": "triton"}))
    with pytest.raises(RefusedError, match="needs an NVIDIA GPU"):
        build("jax", options=BuildOptions(implementations={"layer_norm": "pallas"}))
    assert build("jax", options=BuildOptions(implementations={"nf4_dequantize": "xla"}))


@pytest.mark.parametrize(
    ("variant", "lora", "kernels"),
    [
        ("nested", {}, ("add_rms_norm_backward", "lora_append", "gated_activation_backward", "rope_split")),
        ("sandwich", {}, ("add_rms_norm_backward", "lora_append", "gated_activation_backward", "rope_split")),
        ("qk_norm", {"dropout": 0.1}, ("add_rms_norm_backward", "rope_split", "rope_merge")),
        ("unnormed", {"r": 257}, ("add_rms_norm_backward", "gated_activation_backward")),
    ],
)
def test_the_pass_lowers_for_cuda(monkeypatch, variant, lora, kernels):
    """The interpreter accepts what a GPU refuses. In float32 attention is the op's: cuDNN can't be asked without a GPU."""
    options = BuildOptions(implementations=FUSED)
    model, spec, _, values = build("jax", WIDTHS, revise=VARIANTS[variant], lora=lora, options=options)
    model._ops = Ops(Target("cuda", "float32", {"hidden": spec.hidden}), {})
    for module in (attention, linear, mlp, norm, written_pass):
        monkeypatch.setattr(module, "platform", lambda: "cuda")
    model.add_adapters(spec, values)
    batch = first_batch(stream(examples(4, VOCAB)))
    frequencies, ropes = model.frequencies(64)
    plan = ProgramPlan(Checkpointing(True, "selective"), 64, unpacked=True)
    arrays = tuple(map(jnp.asarray, (batch.input_ids, batch.targets, batch.segments, batch.positions, batch.rows)))

    def gradients(trained, frozen):
        def loss(trained):
            words = jnp.array(step_key(3, 5), jnp.uint32)
            return summed_loss(model.structure, trained, frozen, (ropes, frequencies), arrays, words, plan, CausalLoss())

        return jax.grad(loss)(trained)

    text = lowered_for_cuda(gradients, model.trained, model.frozen)
    for kernel in kernels:
        assert kernel in text, kernel

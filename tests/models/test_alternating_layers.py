"""Layers that alternate, as Gemma's and Ministral's do: windows, rotary frequencies and adapters with a period of two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MinistralConfig, MinistralForCausalLM

from jaxsloth.backend import BuildOptions
from jaxsloth.models.spec import ModelSpec
from jaxsloth.parity.measure import relative_frobenius
from tests.support.small_models import BACKENDS, VOCAB, build, compare_gradients, peft_over
from tests.support.sources import examples, first_batch, stream
from tests.support.tiny import CONFIG

WINDOW = 7  # far shorter than the rows
BAR = 3e-5  # sums of another order; a wrong term is worth 1e-2 and more


def alternating(theta: float):
    """A spec with a window and its own theta in every other layer, the first one included."""

    def revise(spec: ModelSpec) -> ModelSpec:
        layers = list(spec.layers)
        for index in range(0, len(layers), 2):
            attention = layers[index].attention
            assert attention.rope is not None
            local = replace(attention, window=WINDOW, rope=replace(attention.rope, theta=theta))
            layers[index] = layers[index].with_bodies(self_attn=local)
        return replace(spec, layers=tuple(layers))

    return revise


def options(train_pass: str, mode: str, loop: str = "scan") -> BuildOptions:
    return BuildOptions(gradient_checkpointing=mode, implementations={"train_pass": train_pass, "layer_loop": loop})


@pytest.mark.parametrize("train_pass", ["fused", pytest.param("composed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_are_ministrals(backend, train_pass):
    """Gradients are PEFT's on transformers' own model of this kind."""
    chosen = options(train_pass, "none")
    model, spec, weights, values = build(backend, revise=alternating(CONFIG["rope_theta"]), options=chosen)
    assert spec.layer_period() == 2
    fields = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type", "rope_theta")}
    judge = MinistralForCausalLM(
        MinistralConfig(
            **fields,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    )
    judge.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    compare_gradients(model, peft_over(judge.float().eval(), spec, values))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("backend", "mode", "loop"),
    [
        ("torch", "none", "scan"),
        ("torch", "full", "scan"),
        pytest.param("jax", "selective", "scan", marks=pytest.mark.slow),
        pytest.param("jax", "none", "unrolled", marks=pytest.mark.slow),
    ],
)
def test_adapters_and_rotary_frequencies_that_alternate_too(backend, mode, loop, packing):
    """Only every other down_proj has an adapter, and no o_proj: on JAX the blocks' rooms differ. Judged by the composed ops."""
    targets = ["q_proj", "k_proj", "v_proj", "model.layers.1.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    how = {"lora": {"r": 24, "targets": targets}, "revise": alternating(100.0)}
    batch = first_batch(stream(examples(8 if packing else 4, VOCAB), packing=packing))
    judge, model = (build(backend, options=options(name, mode, loop), **how)[0] for name in ("composed", "fused"))
    (expected, theirs), (loss, ours) = judge.gradients(batch), model.gradients(batch)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert len(theirs) == 2 * (3 * 4 + 2) and all(gradient.any() for gradient in theirs.values())
    assert max(relative_frobenius(ours[name], gradient) for name, gradient in theirs.items()) <= BAR

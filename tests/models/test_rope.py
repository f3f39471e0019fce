"""Rotary frequencies against transformers'."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxsloth.models.registry import spec_from_config
from jaxsloth.models.rope import inverse_frequencies

ORIGINAL = {"original_max_position_embeddings": 4096}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, **ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [2.0 + i / 16 for i in range(32)],
        **ORIGINAL,
    },
}


@pytest.mark.parametrize("length", [None, 30000])
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_frequencies_are_transformers(name, length):
    parameters = {"rope_theta": 5e5, **SCALINGS[name]}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=16384, rope_parameters=parameters)
    judge, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    rope = spec_from_config(config.to_dict()).layers[0].attention.rope
    assert rope is not None
    frequencies, ours = inverse_frequencies(rope, max_positions=16384, length=length)
    assert np.max(np.abs(np.float32(frequencies) / judge.numpy() - 1)) <= 2.5e-7
    assert ours == pytest.approx(scaling, rel=1e-12)


def test_plain_frequencies_are_transformers_to_the_bit():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=576, num_attention_heads=9, rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    judge = LlamaRotaryEmbedding(config).inv_freq.numpy()
    rope = spec_from_config(config.to_dict()).layers[0].attention.rope
    assert rope is not None
    assert np.array_equal(np.float32(inverse_frequencies(rope, max_positions=2048)[0]), judge)


def test_the_old_spelling_of_a_scaling():
    base = LlamaConfig(hidden_size=256, num_attention_heads=4).to_dict()
    base.pop("rope_parameters")
    old = spec_from_config(base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = spec_from_config(base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}})
    assert old.layers[0].attention.rope == new.layers[0].attention.rope


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be greater than or equal to 1, got 0.5"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer below 2\\^31, got '64'"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"architectures": ["MambaForCausalLM"]}, "unsupported architecture: MambaForCausalLM; supported: LlamaForCausalLM"),
    ],
)
def test_wrong_configs(changes, message):
    config = LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
    with pytest.raises(ValueError, match=message):
        spec_from_config(config | changes)

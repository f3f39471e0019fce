"""A small config.json of every family, with what makes it different from Llama."""

from __future__ import annotations

import copy

from tests.support.tiny import CONFIG

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0],
}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
# What a family's config.json says beside `CONFIG`; rows are up to 40 tokens, so that a window of 8 shows.
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "mistral": {"sliding_window": 8, "rope_parameters": YARN},
    "gemma": {"hidden_act": "gelu", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "rope_parameters": TWO_ROPES,
        "sliding_window_pattern": 2,
    },
    "phi3": {"sliding_window": 12, "rope_parameters": LONG, "original_max_position_embeddings": 128, "pad_token_id": 2},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True, "pad_token_id": 2},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def config_of(family):
    changes = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    config = copy.deepcopy(CONFIG | changes | FAMILIES[family])  # transformers fills in a config that it gets
    if "rope_parameters" in config:
        del config["rope_theta"]
    return config


def changes_of(family):
    """`config_of` as changes of `CONFIG`; null where a field is left out."""
    config = config_of(family)
    return config | dict.fromkeys(CONFIG.keys() - config.keys())

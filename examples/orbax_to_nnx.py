"""Run a Llama that `jaxsloth convert MODEL FOLDER --to orbax` wrote, with plain orbax and flax.nnx:

python examples/orbax_to_nnx.py FOLDER "The capital of France is"
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from transformers import AutoTokenizer


def module(tree, eps):
    """The tree as flax.nnx modules under its own names."""
    kinds = {"kernel": nnx.Linear, "embedding": nnx.Embed, "scale": nnx.RMSNorm}
    own = {"kernel": {"use_bias": False}, "embedding": {}, "scale": {"epsilon": eps}}
    kind = next((name for name in kinds if name in tree), None)
    made = kinds[kind](*tree[kind].shape, rngs=nnx.Rngs(0), **own[kind]) if kind else nnx.Module()
    for name, value in tree.items():
        setattr(made, name, module(value, eps) if isinstance(value, dict) else nnx.Param(jnp.asarray(value)))
    return made


def logits(model, ids, config):
    """[batch, length] token ids to [batch, length, vocabulary]."""
    rope, base = config.get("rope_parameters") or config, model.model
    assert rope.get("rope_type", "default") == "default", "rotary frequencies are scaled: see transformers' modeling_rope_utils"
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    angles = jnp.arange(ids.shape[1])[:, None, None] / rope["rope_theta"] ** (jnp.arange(0, size, 2) / size)

    def turned(x):
        turns = jax.lax.complex(*jnp.split(x.astype(jnp.float32), 2, axis=-1)) * jnp.exp(1j * angles)
        return jnp.concatenate([turns.real, turns.imag], axis=-1).astype(x.dtype)

    x = base.embed_tokens(ids)
    for index in range(config["num_hidden_layers"]):
        layer = getattr(base.layers, str(index))
        own, mlp, y = layer.self_attn, layer.mlp, layer.input_layernorm(x)
        q, k, v = (linear(y).reshape(*ids.shape, -1, size) for linear in (own.q_proj, own.k_proj, own.v_proj))
        x += own.o_proj(jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True).reshape(*ids.shape, -1))
        y = layer.post_attention_layernorm(x)
        x += mlp.down_proj(nnx.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    x = base.norm(x)
    return model.lm_head(x) if hasattr(model, "lm_head") else base.embed_tokens.attend(x)


folder, prompt = Path(sys.argv[1]).absolute(), " ".join(sys.argv[2:]) or "The capital of France is"
config, tokenizer = json.loads((folder / "config.json").read_text()), AutoTokenizer.from_pretrained(folder)
model = module(ocp.StandardCheckpointer().restore(folder / "params"), config["rms_norm_eps"])
last = logits(model, jnp.array([tokenizer(prompt)["input_ids"]]), config)[0, -1]
print(prompt + tokenizer.decode([int(last.argmax())]), last.tolist(), sep="\n")

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
    """The tree as flax.nnx modules under its own names: Linear where a kernel is, else Embed, RMSNorm or a plain Module."""
    made, rngs = nnx.Module(), nnx.Rngs(0)
    if "kernel" in tree:
        made = nnx.Linear(*tree["kernel"].shape, use_bias=False, rngs=rngs)
    elif "embedding" in tree:
        made = nnx.Embed(*tree["embedding"].shape, rngs=rngs)
    elif "scale" in tree:
        made = nnx.RMSNorm(*tree["scale"].shape, epsilon=eps, rngs=rngs)
    for name, value in tree.items():
        setattr(made, name, module(value, eps) if isinstance(value, dict) else nnx.Param(jnp.asarray(value)))
    return made


def logits(model, ids, config):
    """[batch, length] token ids to [batch, length, vocabulary]."""
    base, (batch, length) = model.model, ids.shape
    rope = config.get("rope_parameters") or config
    assert rope.get("rope_type", "default") == "default", "rotary frequencies are scaled: see transformers' modeling_rope_utils"
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    angles = jnp.arange(length)[:, None, None] / rope["rope_theta"] ** (jnp.arange(0, head_dim, 2) / head_dim)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def turned(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    x = base.embed_tokens(ids)
    for index in range(config["num_hidden_layers"]):
        layer = getattr(base.layers, str(index))
        attention, mlp, y = layer.self_attn, layer.mlp, layer.input_layernorm(x)
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (linear(y).reshape(batch, length, -1, head_dim) for linear in linears)
        y = jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + attention.o_proj(y.reshape(batch, length, -1))
        y = layer.post_attention_layernorm(x)
        x = x + mlp.down_proj(nnx.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    x = base.norm(x)
    return model.lm_head(x) if hasattr(model, "lm_head") else base.embed_tokens.attend(x)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
    config = json.loads((folder / "config.json").read_text())
    model = module(ocp.StandardCheckpointer().restore(folder / "params"), config["rms_norm_eps"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    length = len(ids) + 8
    forward = nnx.jit(lambda model, ids: logits(model, ids, config))  # of one length: causal rows don't see the zeros behind
    for end in range(len(ids), length):
        found = forward(model, jnp.zeros((1, length), int).at[0, :end].set(jnp.array(ids)))[0, end - 1]
        ids.append(int(found.argmax()))
    print(tokenizer.decode(ids), ids, found.tolist(), sep="\n")

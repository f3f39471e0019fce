"""Names: which tensors a spec's model has, what they are called, and how PEFT calls an adapter's.

The names are Hugging Face's (``model.layers.0.self_attn.q_proj.weight``), the same in both backends, in checkpoints, in
adapters and in error messages.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxsloth.models.spec import Attention, Linear, ModelSpec, Norm

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
LM_HEAD = "lm_head"
PEFT_PREFIX = "base_model.model."


def is_embedding(parts: Iterable[str]) -> bool:
    """Whether a trained tensor, its name cut at the dots, is the embedding or the head, which no adapter trains."""
    return not {EMBEDDING.rpartition(".")[2], LM_HEAD}.isdisjoint(parts)


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}"


def stacked_name(name: str, period: int) -> tuple[str, int]:
    """(the name under which a tensor's stack goes: the first block's, its place in the stack); others keep their own."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return name, 0
    place, first = divmod(int(parts[2]), period)
    return ".".join(["model", "layers", str(first), *parts[3:]]), place


def layer_linears(spec: ModelSpec, index: int) -> tuple[Linear, ...]:
    """The linear layers of block `index`, in the order in which the forward pass meets them."""
    layer, prefix = spec.layers[index], layer_prefix(index)
    attention, mlp = layer.attention, layer.mlp
    q_width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    if attention.fused_qkv:
        projections = [Linear(f"{prefix}.self_attn.qkv_proj", q_width + 2 * kv_width, spec.hidden, attention.qkv_bias)]
    else:
        projections = [
            Linear(f"{prefix}.self_attn.{name}", width, spec.hidden, attention.qkv_bias)
            for name, width in (("q_proj", q_width), ("k_proj", kv_width), ("v_proj", kv_width))
        ]
    projections.append(Linear(f"{prefix}.self_attn.o_proj", spec.hidden, q_width, attention.out_bias))
    if mlp.gated and mlp.fused:
        projections.append(Linear(f"{prefix}.mlp.gate_up_proj", 2 * mlp.width, spec.hidden, mlp.bias))
    else:
        names = ("gate_proj", "up_proj") if mlp.gated else ("up_proj",)
        projections.extend(Linear(f"{prefix}.mlp.{name}", mlp.width, spec.hidden, mlp.bias) for name in names)
    projections.append(Linear(f"{prefix}.mlp.down_proj", spec.hidden, mlp.width, mlp.bias))
    return tuple(projections)


def linears(spec: ModelSpec) -> tuple[Linear, ...]:
    """Every linear layer of the blocks; the head is not among them."""
    return tuple(linear for index in range(len(spec.layers)) for linear in layer_linears(spec, index))


def norms(spec: ModelSpec, index: int) -> dict[str, tuple[Norm, int]]:
    """The norms of block `index`: name -> (settings, width)."""
    block, prefix = spec.layers[index], layer_prefix(index)
    found = {}
    for branch in block.branches:
        found |= {f"{prefix}.{name}": (norm, spec.hidden) for name, norm in branch.norms.items()}
        if isinstance(branch.body, Attention) and branch.body.qk_norm is not None:
            own = branch.body.qk_norm, branch.body.head_dim
            found |= {f"{prefix}.{branch.name}.{name}": own for name in ("q_norm", "k_norm")}
    return found


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every base tensor that a decoder with this spec needs: name -> shape. A tied head has no tensor of its own."""
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (spec.embedding.vocab, spec.hidden)}
    for index in range(len(spec.layers)):
        for linear in layer_linears(spec, index):
            shapes[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                shapes[f"{linear.name}.bias"] = (linear.out_features,)
        for name, (norm, width) in norms(spec, index).items():
            shapes[f"{name}.weight"] = (width,)
            if norm.bias:
                shapes[f"{name}.bias"] = (width,)
    if spec.norm is not None:
        shapes[f"{FINAL_NORM}.weight"] = (spec.hidden,)
        if spec.norm.bias:
            shapes[f"{FINAL_NORM}.bias"] = (spec.hidden,)
    if not spec.head.tied:
        shapes[f"{LM_HEAD}.weight"] = (spec.embedding.vocab, spec.hidden)
    return shapes


def lora_names(module: str) -> tuple[str, str]:
    """PEFT's names of a module's two adapter weights, A ``[r, in]`` and B ``[out, r]``, as in adapter_model.safetensors."""
    return f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"


def saved_name(tensor: str) -> str:
    """PEFT's name of a tensor of a module that is trained whole: ``base_model.model.`` and the tensor's own."""
    return f"{PEFT_PREFIX}{tensor}"


def own_name(trained: str) -> str:
    """The model's own name of what PEFT calls `trained`: a base tensor's, or ``….q_proj.lora_A.weight``. PEFT wraps a layer
    that has an adapter, and calls its bias ``….q_proj.base_layer.bias``."""
    return trained.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def check_base_is_whole(spec: ModelSpec) -> None:
    """ValueError where turning the adapters off would not give the base model back: parts of it are trained themselves."""
    adapters = {name for module in (spec.lora.modules if spec.lora is not None else ()) for name in lora_names(module)}
    for name in trainable_shapes(spec):
        if name not in adapters:
            raise ValueError(
                f"the base model can't stand for the reference: {own_name(name)} is trained itself, not by an adapter; "
                "give a reference model of its own, or the reference's log-probs"
            )


def trainable_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every trained tensor under its PEFT name -> shape, in a fixed order: adapters, biases, whole modules."""
    if spec.lora is None:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    by_name = {linear.name: linear for linear in linears(spec)}
    base = tensor_shapes(spec)
    for module in spec.lora.modules:
        a, b = lora_names(module)
        shapes[a] = (spec.lora.r, by_name[module].in_features)
        shapes[b] = (by_name[module].out_features, spec.lora.r)
    for linear in by_name.values():
        if linear.bias and (spec.lora.bias == "all" or (spec.lora.bias == "lora_only" and linear.name in spec.lora.modules)):
            layer = f"{linear.name}.base_layer" if linear.name in spec.lora.modules else linear.name
            shapes[saved_name(f"{layer}.bias")] = (linear.out_features,)
    for module in spec.lora.modules_to_save:
        for tensor, shape in base.items():
            if tensor.rpartition(".")[0] == module:
                shapes[saved_name(tensor)] = shape
    return shapes

"""What of a spec the backends can build today."""

from __future__ import annotations

from jaxsloth.models.spec import ModelSpec


def check_buildable(spec: ModelSpec, backend: str) -> None:
    """ValueError names the first field of the spec that the backends have no layer for; both have the same ones."""
    wrong: list[str] = []
    for index, layer in enumerate(spec.layers):
        norms = [*(norm for branch in layer.branches for norm in branch.norms.values()), layer.attention.qk_norm]
        if any(norm is not None and (norm.kind != "rms" or norm.bias) for norm in norms):
            wrong.append(f"layers[{index}]: layer norms")
        if any(branch.position == "post" or branch.scale != 1.0 for branch in layer.branches):
            wrong.append(f"layers[{index}]: norms behind the sum, or scaled branches")
        if not layer.mlp.gated:
            wrong.append(f"layers[{index}].mlp.gated False")
    embedding, head = spec.embedding, spec.head
    if embedding.learned_positions or embedding.token_types or embedding.norm is not None:
        wrong.append("embedding: learned positions, token types or a norm")
    if head.kind != "lm" or head.bias or head.transform is not None:
        wrong.append(f"head: {head}")
    if spec.norm is None or spec.norm.kind != "rms":
        wrong.append("norm: a final RMSNorm is needed")
    if wrong:
        raise ValueError(f"the {backend} backend can't build this {spec.family} model: {wrong[0]}")


def decode_refusal(spec: ModelSpec) -> str | None:
    """Why neither backend's fused decoding can run this model, or None."""
    for layer in spec.layers:
        attention = layer.attention
        if not attention.causal:
            return "knows causal attention only"
        scaling = None if attention.rope is None else attention.rope.scaling
        if scaling is not None and scaling.kind in ("dynamic", "longrope"):
            return f"holds the rotary frequencies fixed, and {scaling.kind} scaling changes them with the length"
        if not layer.mlp.gated:
            return "needs a gated MLP"
    return None

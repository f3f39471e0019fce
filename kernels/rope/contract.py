"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of transformers.

``rope(x, cos, sin) -> [batch, length, heads, head_dim]``
    x ``[batch, length, heads, head_dim]``; cos and sin ``[batch, length, rotary_dim / 2]`` float32, already scaled.
    The first rotary_dim channels are rotated, channel i with channel i + rotary_dim / 2; the rest pass through. cos and
    sin are rounded to x's dtype first, as transformers does.

The backward is the rotation by the opposite angle: ``dx = rope(dy, cos, -sin)``; only cos and sin are kept.

``tables(positions, inverse_frequencies, attention_scaling) -> (cos, sin)``
    positions ``[batch, length]`` int, inverse_frequencies ``[rotary_dim / 2]`` float32; angles are formed in float32.
"""

from jaxsloth.kernels.registry import Implementation, Op, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

ROPE = Op(
    "rope",
    (
        Implementation("triton", "torch", "jaxsloth.kernels.rope.triton_kernel:rope", needs_cuda),
        Implementation("torch", "torch", "jaxsloth.kernels.rope.torch_ops:rope"),
        Implementation("xla", "jax", "jaxsloth.kernels.rope.xla_ops:rope"),
    ),
)
OPS = (ROPE,)
TOLERANCES = {
    "float32": Tolerance(output=1e-6, gradient=1e-6),
    "bfloat16": Tolerance(output=8e-3, gradient=8e-3),
    "float16": Tolerance(output=1e-3, gradient=1e-3),
}

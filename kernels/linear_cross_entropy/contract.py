"""The language-model head and its loss in one: the logits never exist whole.

``linear_cross_entropy(hidden, weight, targets, *, soft_cap=None, ignore_index=-100, chunk=None,
per_token=False, label_smoothing=0.0) -> float32 scalar``
    hidden ``[tokens, width]`` in the compute dtype; weight ``[vocab, width]``; targets ``[tokens]`` int, already shifted
    (targets[t] is what token t must predict). The result is the SUM over targets != ignore_index of
    ``logsumexp(logits) - logits[target]``, logits = hidden·weightᵀ accumulated and kept in float32 a chunk of tokens at a
    time; soft_cap c: ``c·tanh(logits / c)``. chunk: tokens at a time; None chooses from the shapes. per_token: the result is
    ``[tokens]``, the summands instead of the sum, 0 where the target is ignored. label_smoothing e (Szegedy et al. 2015,
    arXiv:1512.00567): a summand is ``logsumexp(logits) - (1-e)·logits[target] - e·mean(logits)``, as torch's cross_entropy and
    transformers' LabelSmoother have it; they differ in what they divide the sum by, which is the caller's here.

The gradient with respect to hidden is formed in the forward, chunk by chunk (``(softmax - (1-e)·onehot - e/vocab)·weight``),
and is all that is kept; backward multiplies it by the incoming scalar, or each token's by its own. The gradient of the weight
is formed only where the weight is trained (torch: ``requires_grad``; JAX: ``train_weight=True``), in float32: in the same pass
or, per token, in the backward from logits formed again, since only then the tokens' factors are known.
A target outside ``[0, vocab)`` other than ignore_index is an error of the caller; the collator checks it.
"""

from jaxsloth.kernels.registry import Implementation, Op, needs_cuda
from jaxsloth.kernels.tolerance import Tolerance

LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    (
        Implementation(
            "triton", "torch", "jaxsloth.kernels.linear_cross_entropy.triton_kernel:linear_cross_entropy", needs_cuda
        ),
        Implementation("torch", "torch", "jaxsloth.kernels.linear_cross_entropy.torch_ops:linear_cross_entropy"),
        Implementation("xla", "jax", "jaxsloth.kernels.linear_cross_entropy.xla_ops:linear_cross_entropy"),
    ),
)
OPS = (LINEAR_CROSS_ENTROPY,)
TOLERANCES = {
    "float32": Tolerance(output=1e-6, gradient=4e-6),
    "bfloat16": Tolerance(output=2e-3, gradient=1.2e-2),
    "float16": Tolerance(output=5e-4, gradient=2e-3),
}

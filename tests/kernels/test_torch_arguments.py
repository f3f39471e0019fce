"""The torch ops' answers to wrong arguments, and the parts of their contracts that no case reaches."""

from __future__ import annotations

import pytest
import torch

from jaxsloth.kernels.attention.contract import ATTENTION, sizes_of
from jaxsloth.kernels.attention.torch_ops import attention
from jaxsloth.kernels.dropout.contract import module_key
from jaxsloth.kernels.gated_activation.torch_ops import gated_activation
from jaxsloth.kernels.linear_cross_entropy.torch_ops import default_chunk, linear_cross_entropy
from jaxsloth.kernels.lora_matmul.contract import Dropout
from jaxsloth.kernels.lora_matmul.torch_ops import lora_matmul
from jaxsloth.kernels.registry import Target, select
from jaxsloth.kernels.rope.cases import CASES as ROPE_CASES
from jaxsloth.kernels.rope.cases import make_inputs as make_rope_inputs
from jaxsloth.kernels.rope.torch_ops import rope, tables


def test_lora_matmul_refuses():
    x, base, a = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4)
    with pytest.raises(ValueError, match="pass both or neither"):
        lora_matmul(x, base, a)
    with pytest.raises(ValueError, match="frozen"):
        lora_matmul(x, base.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"\[batch, length, in\]; got \(2, 4\)"):
        lora_matmul(x, base, a, torch.ones(3, 1), dropout=Dropout(0.1, torch.tensor([0, 0]), torch.arange(2)))


def test_dropout_of_rate_zero_changes_nothing():
    x, base, a, b = torch.ones(2, 3, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
    dropout = Dropout(0.0, torch.tensor(module_key(0, 0, "m")), torch.arange(2))
    assert torch.equal(lora_matmul(x, base, a, b, dropout=dropout), lora_matmul(x, base, a, b))


def test_a_dense_base_of_another_dtype_is_read_in_that_of_x():
    x, base = torch.full((2, 4), 1 / 3), torch.full((3, 4), 1 / 3)
    assert torch.equal(lora_matmul(x.bfloat16(), base), lora_matmul(x.bfloat16(), base.bfloat16()))


@pytest.mark.parametrize(
    ("backend", "target", "chosen"),
    [
        ("torch", Target("cuda", "bfloat16", sizes_of(256, 50.0)), "triton"),
        ("torch", Target("cuda", "bfloat16", sizes_of(128, None)), "torch"),
        ("torch", Target("cuda", "bfloat16", sizes_of(512, 50.0)), "torch"),
        ("torch", Target("cpu", "float32", sizes_of(256, 50.0)), "torch"),
        ("jax", Target("cuda", "bfloat16", sizes_of(256, 50.0)), "pallas"),
        ("jax", Target("cuda", "bfloat16", sizes_of(128, None)), "xla"),
    ],
)
def test_our_attention_is_chosen_for_a_soft_cap_on_a_gpu(backend, target, chosen):
    assert select(ATTENTION, backend, target).implementation.name == chosen


def test_attention_refuses():
    q, kv = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2, 4)
    with pytest.raises(ValueError, match="multiple of kv_heads, got 3 and 2"):
        attention(q, kv, kv, scale=1.0)
    segments = torch.ones(1, 2, dtype=torch.int32)
    kv = torch.ones(1, 5, 1, 4)
    with pytest.raises(ValueError, match="without q_segments"):
        attention(q, kv, kv, scale=1.0, kv_segments=torch.ones(1, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="can't stand for 5 keys"):
        attention(q, kv, kv, scale=1.0, q_segments=segments)


def test_an_offset_may_be_a_tensor():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 8, generator=generator) for n in (3, 9, 9))
    by_int = attention(q, k, v, scale=1.0, q_offset=4)
    assert torch.equal(by_int, attention(q, k, v, scale=1.0, q_offset=torch.tensor(4, dtype=torch.int32)))


@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_what_a_padded_query_and_a_padded_key_hold_never_shows(soft_cap):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 2, 8, generator=generator) for _ in range(3))
    segments = torch.tensor([[1, 1, 1, 2, 2, 0]], dtype=torch.int32)
    clean = attention(q, k, v, scale=1.0, soft_cap=soft_cap, q_segments=segments)
    assert torch.equal(clean[:, 5], torch.zeros(1, 2, 8))
    k[:, 5], v[:, 5] = 1e4, 1e4
    assert torch.equal(clean, attention(q, k, v, scale=1.0, soft_cap=soft_cap, q_segments=segments))


def test_rope_refuses_tables_wider_than_a_head():
    with pytest.raises(ValueError, match="turn 8 channels, and a head has 6"):
        rope(torch.ones(1, 2, 1, 6), torch.ones(1, 2, 4), torch.ones(1, 2, 4))


@pytest.mark.parametrize("case", ROPE_CASES, ids=lambda case: case.name)
def test_rope_tables(case):
    inputs = {name: torch.from_numpy(array) for name, array in make_rope_inputs(case, 0).items()}
    cos, sin = tables(inputs["positions"], inputs["inverse_frequencies"], case.attention_scaling)
    # float32 cosines of exact angles: an ulp of 1.3.
    torch.testing.assert_close(cos, inputs["cos"], rtol=0, atol=2.4e-7)
    torch.testing.assert_close(sin, inputs["sin"], rtol=0, atol=2.4e-7)


def test_gated_activation_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="one of silu, gelu, gelu_tanh, relu; got 'tanh'"):
        gated_activation(torch.ones(1, 2), torch.ones(1, 2), kind="tanh")


def test_the_loss_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), chunk=0)


def test_the_loss_without_gradients_is_the_same():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 8, generator=generator).requires_grad_(), torch.randn(20, 8, generator=generator)
    targets = torch.arange(9)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, soft_cap=3.0)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets, soft_cap=3.0).detach())
    assert not loss.requires_grad


@pytest.mark.parametrize(("tokens", "vocab", "chunk"), [(5, 100, 16), (4096, 49152, 1024), (10, 2**26, 16), (64, 1000, 64)])
def test_the_chosen_chunk(tokens, vocab, chunk):
    assert default_chunk(tokens, vocab) == chunk

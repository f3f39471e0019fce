"""Draws by Gumbel noise as a Triton kernel: a row's scores are shared out among programs, whose best are compared after."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int

from jaxsloth.kernels.dropout.contract import MULTIPLIERS, ROUNDS, WEYL
from jaxsloth.kernels.dropout.triton_parts import wide_product
from jaxsloth.kernels.gumbel.contract import DOMAIN, MOST, SERIES, SERIES_BELOW, share_of

BLOCK, WARPS = 1024, {"num_warps": 4}
_M0, _M1, _W0, _W1 = (tl.constexpr(value) for value in (*MULTIPLIERS, *WEYL))
_ROUNDS, _DOMAIN, _MOST, _BELOW = (tl.constexpr(value) for value in (ROUNDS, DOMAIN, MOST, SERIES_BELOW))
_S2, _S3, _S4, _S5, _S6 = (tl.constexpr(value) for value in SERIES[1:])


@triton.jit
@no_type_check  # the tests' type checker would wrap the source that Triton reads
def _draw_kernel(
    scores, ids, keys, rows, positions, values, places, n, share, programs, LISTED: tl.constexpr, BLOCK: tl.constexpr
):
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    score = tl.load(scores + row * n + place, mask=inside, other=float("-inf"))
    token = tl.load(ids + row * n + place, mask=inside, other=0).to(tl.int32) if LISTED else place
    a = (token % share).to(tl.uint32)
    b = tl.zeros_like(a) + tl.load(positions + row).to(tl.uint32)
    c = tl.zeros_like(a) + tl.load(rows + row).to(tl.uint32)
    d = tl.zeros_like(a) + _DOMAIN
    k0, k1 = tl.load(keys + 2 * row).to(tl.uint32), tl.load(keys + 2 * row + 1).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        a_high, a_low = wide_product(a, _M0)
        c_high, c_low = wide_product(c, _M1)
        a, b, c, d = c_high ^ (b ^ k0), c_low, a_high ^ (d ^ k1), a_low
        k0 += _W0
        k1 += _W1
    quarter = token // share
    word = tl.where(quarter == 0, a, tl.where(quarter == 1, b, tl.where(quarter == 2, c, d)))
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _MOST)  # 2**-32
    series = v * (1.0 + v * (_S2 + v * (_S3 + v * (_S4 + v * (_S5 + v * _S6)))))
    noise = -tl.log(tl.where(v < _BELOW, series, -tl.log(1.0 - v)))
    value, best = tl.max(score + noise, axis=0, return_indices=True)
    tl.store(values + row * programs + program, value)
    # Where nothing is larger than anything (NaN), `best` may lie behind the end.
    tl.store(places + row * programs + program, tl.minimum(program * BLOCK + best, n - 1))


@torch.no_grad()
def draw(
    scores: Float32[torch.Tensor, "batch n"],
    ids: Int[torch.Tensor, "batch n"] | None,
    keys: Int[torch.Tensor, "batch 2"],
    rows: Int[torch.Tensor, " batch"],
    positions: Int[torch.Tensor, " batch"],
    *,
    vocab: int,
) -> Int[torch.Tensor, " batch"]:
    """See the contract. keys: int64."""
    batch, n = scores.shape
    scores, ids = scores.contiguous(), None if ids is None else ids.contiguous()
    block = min(BLOCK, triton.next_power_of_2(n))
    programs = triton.cdiv(n, block)
    values = torch.empty(batch, programs, dtype=torch.float32, device=scores.device)
    places = torch.empty(batch, programs, dtype=torch.int64, device=scores.device)
    with torch.cuda.device_of(scores):
        _draw_kernel[(batch, programs)](
            scores,
            scores if ids is None else ids,
            keys.contiguous(),
            rows,
            positions,
            values,
            places,
            n,
            share_of(vocab),
            programs,
            LISTED=ids is not None,
            BLOCK=block,
            **WARPS,
        )
    if programs == 1:
        return places[:, 0]
    return places.gather(1, values.argmax(dim=1, keepdim=True))[:, 0]

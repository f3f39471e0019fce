"""The three products of lora_dropout on buffers as written passes have them, for torch modules that hold them."""

from __future__ import annotations

from typing import Any

import torch

from jaxsloth.kernels.lora_dropout import reference
from jaxsloth.kernels.lora_dropout.contract import TOLERANCES
from jaxsloth.kernels.lora_matmul.contract import pad_for
from jaxsloth.parity.op_runners import masks_of, reference_masks
from tests.kernels.torch_checks import poisoned, prepare, relative_error


def expected_products(case: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(xa, the gradient by x, that by A) in float64."""
    x, a = (inputs[name].detach().double().requires_grad_() for name in ("x", "a"))
    xa = reference.lora_dropout(x, a, **reference_masks(case, inputs))
    of_x, of_a = torch.autograd.grad(xa, (x, a), inputs["dy"].double())
    return xa.detach(), of_x, of_a


def check_products(module: Any, case: Any, dtype: str, device: str) -> None:
    """Rows with columns behind them, which xa is written into; what no product is to read is NaN; twice to the same bits."""
    inputs, to = prepare("lora_dropout", case, dtype, device), getattr(torch, dtype)
    inputs["a"] = inputs["a"].to(to)
    masks, rank = masks_of(case, inputs, lambda value: value), sum(case.ranks)
    pad, tokens = pad_for(rank), case.tokens
    wide = torch.full((tokens, case.in_ + pad), float("nan"), dtype=to, device=device)
    wide[:, : case.in_] = inputs["x"]
    a = torch.full((pad, case.in_ + 3), float("nan"), dtype=to, device=device)
    a[:rank, : case.in_] = inputs["a"]
    g = torch.full((tokens, pad + 5), float("nan"), dtype=to, device=device)[:, 5:]
    g[:, :rank] = inputs["dy"]
    stream = torch.randn(tokens, case.in_ + 1, generator=torch.Generator().manual_seed(1)).to(device, to)[:, : case.in_]
    found = []
    for _ in range(2):
        totals = [torch.ones(r, case.in_, device=device) for r in case.ranks]
        with poisoned():
            xa = module.project(wide, a[:, : case.in_], masks, out=wide[:, case.in_ :]).clone()
            dx = module.input_gradient(stream.clone(), g, a[:, : case.in_], masks)
            module.gradient_a(g, wide, masks, totals)
        found.append((xa, dx, torch.cat(totals)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    xa, dx, da = found[0]
    assert (xa[:, rank:] == 0).all()
    tolerance = TOLERANCES[dtype]
    expected, dx_expected, da_expected = expected_products(case, inputs)
    assert relative_error(xa[:, :rank], expected) <= tolerance.output
    assert relative_error(dx, stream.double() + dx_expected) <= tolerance.gradient
    assert relative_error(da, 1 + da_expected) <= tolerance.gradient

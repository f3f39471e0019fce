"""One body for every implementation of the 8-bit ops: against their definition in float64, and twice."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from jaxsloth.kernels.fp8 import reference, torch_ops
from jaxsloth.kernels.fp8.cases import Case, make_inputs
from jaxsloth.kernels.fp8.contract import LARGEST, PRODUCT, ROUNDING, AdapterBlock, Rows
from jaxsloth.kernels.nf4 import torch_ops as nf4_torch
from jaxsloth.kernels.nf4.cases import Case as Nf4Case
from jaxsloth.kernels.nf4.cases import make_inputs as make_nf4_inputs
from jaxsloth.kernels.nf4.reference import dequantize as reference_dequantize
from tests.kernels.torch_checks import poisoned, relative_error, to_torch

# Nested and plain maxima, widths of one and of many tiles, rows that no tile divides.
NF4_CASES = (
    Nf4Case("small", 48, 64),
    Nf4Case("wide", 33, 1216),
    Nf4Case("tall", 272, 192),
    Nf4Case("zero", 32, 128, "zero_blocks"),
)


def inputs_of(case: Any, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The case's tensors; x and behind with NaN between their rows, where nothing may look."""
    found = to_torch(make_inputs(case, 0), device)
    for name in ("x", "behind"):
        if found[name] is not None:
            wide = torch.full((case.rows, found[name].shape[1] + 16), float("nan"), dtype=dtype, device=device)
            wide[:, :-16] = found[name]
            found[name] = wide[:, :-16]
    found["factor"] = torch.tensor([case.factor], device=device)
    return found


def nearest(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Every value is a nearest one of e4m3, up to float32's rounding before the cast: that may decide ties."""
    assert torch.isfinite(got.float()).all()
    apart, least = (got.double() - exact).abs(), (reference.e4m3(exact) - exact).abs()
    assert (apart <= least + 1e-6 * exact.abs()).all(), f"{(apart - least).max():.1e} further away than the nearest value"


def check_quantize(quantize_rows: Any, case: Any, dtype: str, device: str) -> None:
    found = inputs_of(case, getattr(torch, dtype), device)
    with poisoned():
        rows = quantize_rows(found["x"], found["behind"], found["factor"])
        again = quantize_rows(found["x"], found["behind"], found["factor"])
    scales = reference.quantize_rows(found["x"], found["behind"], case.factor)[1]
    assert rows.values.dtype == torch.float8_e4m3fn and rows.values.is_contiguous()
    assert rows.scales.dtype == torch.float32
    assert torch.equal(rows.values.view(torch.uint8), again.values.view(torch.uint8))
    torch.testing.assert_close(rows.scales.double(), scales, rtol=3e-7, atol=0)
    whole = found["x"].double()
    if found["behind"] is not None:
        whole = torch.cat([whole, case.factor * found["behind"].double()], dim=1)
    nearest(rows.values, whole / scales)
    assert relative_error(reference.meant(rows), whole) <= ROUNDING


def check_values_before_the_cast(quantize_rows_into: Any, case: Any, dtype: str, device: str) -> None:
    """What is about to be cast, from a kernel that is given float32 to write to."""
    found = inputs_of(case, getattr(torch, dtype), device)
    behind, factor = found["behind"], found["factor"].double()
    whole = found["x"].double() if behind is None else torch.cat([found["x"].double(), factor * behind.double()], dim=1)
    values, scales = torch.full(whole.shape, float("nan"), device=device), torch.empty(case.rows, 1, device=device)
    quantize_rows_into(found["x"], behind, found["factor"], values, scales)
    expected = reference.quantize_rows(found["x"], behind, case.factor)[1]
    torch.testing.assert_close(scales.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(values.double(), whole / expected, rtol=1e-6, atol=0)


def check_not_finite(quantize_rows: Any, device: str) -> None:
    """A loss that went wrong must stay so."""
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 32, device=device, dtype=torch.bfloat16)
        x[1, 5] = bad
        meant = reference.meant(quantize_rows(x))
        assert torch.isfinite(meant[0]).all() and meant[1, 5].isnan()


def check_product(scaled_product: Any, case: Any, device: str, strided: bool) -> None:
    found = inputs_of(case, torch.bfloat16, device)
    a = torch_ops.quantize_rows(found["x"], found["behind"], found["factor"])
    b = torch_ops.quantize_rows(found["weight"])
    bias = None if found["bias"] is None else found["bias"].bfloat16()
    out = torch.full((case.rows, case.out + 64 * strided), 7.0, device=device, dtype=torch.bfloat16)
    scaled_product(a, b, bias, out[:, : case.out])
    assert relative_error(out[:, : case.out], reference.scaled_product(a, b, bias)) <= PRODUCT
    assert (out[:, case.out :] == 7.0).all()


def nf4_inputs(case: Nf4Case, nested: bool, transposed: bool, device: str) -> tuple[Any, torch.Tensor]:
    """(a quantized weight, reciprocal scales that let every value fit)."""
    found = to_torch(make_nf4_inputs(case, 0), device)
    quantized = nf4_torch.quantize(found["weight"], nested=nested, offset=found["offset"] if nested else None)
    peaks = nf4_torch.dequantize(quantized, torch.float32).abs().amax(dim=0 if transposed else 1)
    return quantized, LARGEST / peaks.clamp(min=1e-3)


def check_nf4(nf4_into: Any, case: Nf4Case, nested: bool, transposed: bool, dtype: torch.dtype, device: str) -> None:
    """dtype: e4m3, or float32 where the kernel's values before their cast are looked at."""
    quantized, inverse = nf4_inputs(case, nested, transposed, device)
    shape = (case.in_, case.out) if transposed else (case.out, case.in_)
    whole = torch.full((shape[0], shape[1] + 80), 7.0, device=device).to(dtype)
    nf4_into(quantized, inverse, whole[:, 16:-64], transposed=transposed)
    weight = reference_dequantize(quantized)
    expected = (weight.T if transposed else weight) * inverse.double()[:, None]
    assert (whole[:, :16].float() == 7.0).all() and (whole[:, -64:].float() == 7.0).all()
    if dtype == torch.float32:
        torch.testing.assert_close(whole[:, 16:-64].double(), expected, rtol=1e-6, atol=1e-6)
    else:
        nearest(whole[:, 16:-64], expected)


def check_margins(module: ModuleType, dtype: torch.dtype, device: str) -> None:
    """A scaled B beside, a transposed A and zeros, with factors that are needed, and one that is not."""
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(shape, generator=generator).to(device) for shape in ((80, 8), (8, 48)))
    out, in_ = torch.full((80, 64), 7.0, device=device).to(dtype), torch.full((48, 160), 7.0, device=device).to(dtype)
    inverse_out, inverse_in = torch.linspace(1.0, 900.0, 80, device=device), torch.full((48,), 20.0, device=device)
    factors = torch.full((2,), 5.0, device=device)
    first, second = factors.split(1)
    pieces = [
        AdapterBlock(b, out, inverse_out, first, 16, 2.0),
        AdapterBlock(a.T, in_[:, 96:104], inverse_in, second),
        AdapterBlock(None, in_[:, 104:], inverse_in, second),
    ]
    margins = module.AdapterCopy(pieces, torch.empty(0, dtype=dtype, device=device))
    margins.reach(factors)
    needed = (b * 2.0 * inverse_out[:, None]).abs().max() / LARGEST
    assert factors[1] == 1.0 and needed <= factors[0] < 2 * needed and torch.frexp(factors)[0].tolist() == [0.5, 0.5]
    margins.run()
    expected = torch.zeros(80, 64, dtype=torch.float64, device=device)
    expected[:, 16:24] = b.double() * inverse_out.double()[:, None] * (2.0 / factors[0].double())
    cast = (lambda values: values) if dtype == torch.float32 else reference.e4m3
    for got, wanted in ((out, expected), (in_[:, 96:104], a.T.double() * 20.0)):
        assert ((got.double() - cast(wanted)).abs() <= wanted.abs() * (2.0**-4 + 1e-6)).all()
        assert relative_error(got, wanted) <= (1e-6 if dtype == torch.float32 else ROUNDING)
    assert (in_[:, :96].float() == 7.0).all() and not in_[:, 104:].float().any()


def check_the_sum_is_what_was_meant(device: str, product: Any, quantize_rows: Any) -> None:
    """``[x, low] · [W, sB]ᵀ`` by 8 bits is the exact one up to the operands' rounding, factor or none."""
    found = to_torch(make_wide_inputs(), device)
    x, low, weight, margin = (found[name] for name in ("x", "low", "weight", "margin"))
    exact = x.double() @ weight.double().T + low.double() @ margin.double().T
    for factor in (1.0, 16.0):
        a = quantize_rows(x.bfloat16(), low.bfloat16(), torch.tensor([factor], device=device))
        b = torch_ops.quantize_rows(torch.cat([weight, margin / factor], dim=1))
        out = torch.empty(exact.shape, dtype=torch.bfloat16, device=device)
        product(a, Rows(b.values, b.scales), None, out)
        assert relative_error(out, exact) <= 5e-2


def make_wide_inputs() -> dict[str, Any]:
    """A weight with outlier features and a margin an eighth as large."""
    found: dict[str, Any] = make_inputs(Case("", 64, 512, 64, 96), 1)
    weight, margin = found["weight"][:, :512].copy(), found["weight"][:, 512:] / 8
    weight[:, ::97] *= 8
    return {"x": found["x"], "low": found["behind"], "weight": weight, "margin": margin}

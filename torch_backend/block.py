"""A block: branches on the residual stream. It owns the stream, its sums fused with norms, and its gradient; no sublayer.

Kept a branch, by `gradient_checkpointing`, beside what the body keeps:
    none       the stream before the branch, the norm's output, the body's output where it is normed or scaled
    selective  the same without the norm's output, which is formed again
    offload    as selective, in pinned host memory, fetched a block ahead; the block's input alone where that memory is short
    full       the stream before the first branch; the rest runs again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from jaxsloth.models import spec as specs
from jaxsloth.torch_backend.norm import RMSNorm
from jaxsloth.torch_backend.run import Run, StepRun, padded_rows

MakeNorm = Callable[[specs.Norm, str], RMSNorm]


@dataclass
class Kept:
    """A branch's forward as its backward needs it; None where it is formed again.

    total: the stream before the branch; normed with pad columns behind, and the norm's reciprocals; output: the body's, before
    the norm behind it, and that norm's reciprocals. runs_again: of the whole block only the first branch's total is kept.
    """

    total: torch.Tensor | None
    normed: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    output: torch.Tensor | None = None
    post_rstd: torch.Tensor | None = None
    body: dict[str, Any] = field(default_factory=dict)
    runs_again: bool = False


@dataclass(frozen=True)
class Branch:
    """``x + scale·post_norm(body(norm(x)))``."""

    name: str
    body: Any
    norm: RMSNorm | None
    post_norm: RMSNorm | None
    scale: float


class Block(nn.Module):
    """One layer of the model. The parts are modules under their checkpoint names."""

    def __init__(self, block: specs.Block, make_norm: MakeNorm, make_body: Callable[[specs.Branch], nn.Module]) -> None:
        super().__init__()
        branches = []
        for spec in block.branches:
            norm = None if spec.norm is None else make_norm(spec.norm, spec.norm_name)
            body = make_body(spec)
            post_norm = None if spec.post_norm is None else make_norm(spec.post_norm, spec.post_norm_name)
            named = ((spec.norm_name, norm), (spec.name, body), (spec.post_norm_name, post_norm))
            for name, module in named:
                if module is not None:
                    self.add_module(name, module)
            branches.append(Branch(spec.name, body, norm, post_norm, spec.scale))
        self.branches = tuple(branches)

    def passes(self) -> dict[str, str | None]:
        """By branch: why its body has no written pair with the adapters as they are now, or None."""
        return {branch.name: branch.body.written_refusal() for branch in self.branches}

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        for branch in self.branches:
            y = branch.body(x if branch.norm is None else branch.norm(x), run)
            y = y if branch.post_norm is None else branch.post_norm(y)
            x = x + (y if branch.scale == 1.0 else y * branch.scale)
        return x

    def step(
        self, x: torch.Tensor, delta: torch.Tensor | None, cache: Any, run: StepRun
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One token a row: the stream comes and goes as x and what is yet to be added to it."""
        for branch in self.branches:
            x, normed, _ = _enter(branch, x, delta, 0)
            y = branch.body.step(normed, cache, run)
            y = y if branch.post_norm is None else branch.post_norm(y)
            delta = y if branch.scale == 1.0 else y * branch.scale
        return x, delta

    def forward_keeping(
        self, x: torch.Tensor, delta: torch.Tensor | None, run: Run, mode: str | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[Kept] | None]:
        """(the stream and what is yet to be added to it, what is kept); it comes as x + delta. mode None keeps nothing."""
        kept: list[Kept] = []
        for branch in self.branches:
            x, delta, own = _forward(branch, x, delta, run, mode)
            if mode == "full":
                own = Kept(None if kept else own.total, runs_again=True)
            if mode is not None:
                kept.append(own)
            del own
        return x, delta, None if mode is None else kept

    def backward(self, d: torch.Tensor, kept: list[Kept], run: Run, needs_dx: bool) -> None:
        """Turns the gradient of the stream behind the block into that before it, in place, and adds those of what is trained.

        d ``[tokens, hidden + pad]``, its pad columns free to write. needs_dx: False where nothing before the block is trained.
        """
        if kept[0].runs_again:
            self._run_again(kept, run)
        for place in range(len(kept) - 1, -1, -1):
            _backward(self.branches[place], d, kept.pop(), run, needs_dx or place > 0)

    def _run_again(self, kept: list[Kept], run: Run) -> None:
        """Forms what mode "selective" keeps and more from the block's input. The last body runs only where its backward wants
        something of it."""
        x, delta = kept[0].total, None
        assert x is not None
        for place, branch in enumerate(self.branches):
            pair = run.pairs[branch.body]
            if place == len(kept) - 1 and pair.forms_again and branch.post_norm is None:
                total, normed, rstd = _enter(branch, x, delta, pair.pad(run))
                kept[place] = Kept(total, normed, rstd)
            else:
                x, delta, kept[place] = _forward(branch, x, delta, run, "again")


def kept_widths(block: Block, pairs: Mapping[Any, Any], hidden: int, mode: str) -> tuple[int, int]:
    """Elements a token that a block keeps (on the device, on the host)."""
    if mode == "full":
        return hidden, 0
    device = host = 0
    for branch in block.branches:
        own_device, own_host = pairs[branch.body].kept_widths(mode)
        stream = hidden * (1 + (branch.post_norm is not None))
        device, host = device + own_device, host + own_host
        if mode == "offload":
            host += stream
        else:
            device += stream + (hidden if mode == "none" else 0)
    return device, host


def working_width(block: Block, pairs: Mapping[Any, Any], hidden: int) -> int:
    """About the most elements a token that a block's backward works with."""
    return 8 * hidden + sum(pairs[branch.body].working_width() for branch in block.branches)


def offloaded(kept: list[Kept], branches: tuple[Branch, ...], pairs: Mapping[Any, Any]) -> dict[Any, torch.Tensor]:
    """Takes out of `kept` the tensors that go to the host, each under a key for `restore`."""
    found: dict[Any, torch.Tensor] = {}
    for place, (one, branch) in enumerate(zip(kept, branches, strict=True)):
        for name in ("total", "output"):
            tensor = getattr(one, name)
            if tensor is not None:
                found[place, name, None] = tensor
                setattr(one, name, None)
        for name in pairs[branch.body].OFFLOADED:
            if name in one.body:
                found[place, "body", name] = one.body.pop(name)
    return found


def restore(kept: list[Kept], tensors: Mapping[Any, torch.Tensor]) -> None:
    """Puts back what `offloaded` took out."""
    for (place, name, part), tensor in tensors.items():
        if part is None:
            setattr(kept[place], name, tensor)
        else:
            kept[place].body[part] = tensor


def _enter(
    branch: Branch, x: torch.Tensor, delta: torch.Tensor | None, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(the stream x + delta, the body's input with pad columns behind its rows, the norm's reciprocals)."""
    if branch.norm is not None:
        normed, total, rstd = branch.norm.forward_keeping(x, delta, pad)
        return total, normed, rstd
    total = x if delta is None else x + delta
    return total, _padded(total, pad), None


def _padded(x: torch.Tensor, pad: int) -> torch.Tensor:
    if pad == 0:
        return x
    rows = padded_rows(x.shape[0], x.shape[1], pad, x)
    rows[:, : x.shape[1]] = x
    return rows


def _forward(
    branch: Branch, x: torch.Tensor, delta: torch.Tensor | None, run: Run, mode: str | None
) -> tuple[torch.Tensor, torch.Tensor, Kept]:
    pair = run.pairs[branch.body]
    total, normed, rstd = _enter(branch, x, delta, pair.pad(run))
    # delta has been added in: its memory takes the body's output.
    memory = torch.empty_like(total) if delta is None else delta
    keeping = None if mode == "full" else mode
    y, body = pair.forward_keeping(normed, memory, run, keeping)
    kept = Kept(total, body=body)
    if keeping in ("none", "again"):
        kept.normed, kept.rstd = normed, rstd
    if branch.post_norm is not None:
        output, y = y, torch.empty_like(y) if keeping is not None else y
        _, _, post_rstd = branch.post_norm.forward_keeping(output, None, normed=y)
        if keeping is not None:
            kept.output, kept.post_rstd = output, post_rstd
    if branch.scale != 1.0:
        y.mul_(branch.scale)
    return total, y, kept


def _backward(branch: Branch, d: torch.Tensor, kept: Kept, run: Run, needs_dx: bool) -> None:
    assert kept.total is not None
    pair, hidden = run.pairs[branch.body], kept.total.shape[1]
    stream, dy = d[:, :hidden], d
    if branch.post_norm is not None or branch.scale != 1.0:
        dy = padded_rows(d.shape[0], hidden, pair.out_pad(run), d)
        inner = dy[:, :hidden]
        if branch.post_norm is None:
            torch.mul(stream, branch.scale, out=inner)
        else:
            assert kept.output is not None and kept.post_rstd is not None
            branch.post_norm.backward(stream, kept.output, kept.post_rstd, None, inner)
            kept.output = None
            if branch.scale != 1.0:
                inner.mul_(branch.scale)

    def form_x() -> tuple[torch.Tensor, bool]:
        was_kept = kept.normed is not None
        if kept.normed is None:
            assert kept.total is not None
            _, kept.normed, kept.rstd = _enter(branch, kept.total, None, pair.pad(run))
        return kept.normed, was_kept

    dx = pair.backward(dy, kept.body, form_x, run, needs_dx)
    if dx is None:
        return
    if branch.norm is None:
        stream.add_(dx)
        return
    if kept.rstd is None:
        form_x()
    kept.normed = None
    assert kept.rstd is not None
    branch.norm.backward(dx, kept.total, kept.rstd, stream, stream)

"""A body is a sublayer with three moments; where it has no written pair, its backward is the local vjp of its `forward`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from jaxsloth.torch_backend.linear import LinearGroup, gradient_of
from jaxsloth.torch_backend.run import Run, StepRun


class Body(Protocol):
    """A sublayer, its three moments side by side: `forward`, the written pair, `step`."""

    forms_again: bool  # the backward needs nothing but the input
    OFFLOADED: tuple[str, ...]  # names of what is kept that goes to the host in mode "offload"

    def groups(self) -> Mapping[str, LinearGroup]:
        """Its linears by the input that they share, in the order of the forward pass."""
        ...

    def forward(self, x: torch.Tensor, run: Run) -> torch.Tensor:
        """``[batch, length, hidden]`` both ways, from ops; the only statement of the mathematics."""
        ...

    def written_refusal(self) -> str | None:
        """Why the written pair can't run with the adapters as they are now, or None. Then `DefaultPair` stands in its place."""
        ...

    def pad(self, run: Run) -> int:
        """Columns that it wants behind the rows of its input."""
        ...

    def out_pad(self, run: Run) -> int:
        """Columns that it wants behind the rows of its output's gradient."""
        ...

    def kept_widths(self, mode: str) -> tuple[int, int]:
        """Elements a token that it keeps (on the device, on the host)."""
        ...

    def working_width(self) -> int:
        """Elements a token that its backward works with."""
        ...

    def forward_keeping(
        self, x: torch.Tensor, out: torch.Tensor, run: Run, mode: str | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """(the output ``[tokens, hidden]``, what is kept by name). out: memory that the output may be written to. mode: a
        `gradient_checkpointing`; None keeps nothing; "again": a backward of mode "full" runs the body again."""
        ...

    def backward(
        self,
        dy: torch.Tensor,
        kept: dict[str, Any],
        form_x: Callable[[], tuple[torch.Tensor, bool]],
        run: Run,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        """The gradient of the input, where it is needed; adds those of what is trained. kept is used up.

        dy ``[tokens, hidden + out_pad or more]``. form_x: gives the input with its pad columns, and whether a forward of this
        body has written to these.
        """
        ...

    def step(self, x: torch.Tensor, cache: Any, run: StepRun) -> torch.Tensor:
        """One token a row ``[rows, hidden]``, inside a recorded program."""
        ...


class DefaultPair:
    """Stands in a written pass for a body that refuses its own pair. reason: why it does.

    It keeps nothing: the block forms the body's input again. Dropout's masks come from counters, so that they are the same
    when they are formed again.
    """

    forms_again = True
    OFFLOADED = ()

    def __init__(self, body: Any, reason: str) -> None:
        self.body, self.reason = body, reason

    def groups(self) -> Mapping[str, LinearGroup]:
        """None: the products are the body's own."""
        return {}

    def pad(self, run: Run) -> int:
        del run
        return 0

    def out_pad(self, run: Run) -> int:
        del run
        return 0

    def kept_widths(self, mode: str) -> tuple[int, int]:
        del mode
        return 0, 0

    def working_width(self) -> int:
        """Elements a token that the local graph holds: about two of everything that the written pair keeps and works with."""
        return 2 * (self.body.kept_widths("none")[0] + self.body.working_width())

    @torch.no_grad()
    def forward_keeping(
        self, x: torch.Tensor, out: torch.Tensor, run: Run, mode: str | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        del out, mode
        return self.body(x.unflatten(0, run.segments.shape), run).flatten(0, 1), {}

    def backward(
        self,
        dy: torch.Tensor,
        kept: dict[str, Any],
        form_x: Callable[[], tuple[torch.Tensor, bool]],
        run: Run,
        needs_dx: bool,
    ) -> torch.Tensor | None:
        del kept
        x, _ = form_x()
        leaf = x.detach().unflatten(0, run.segments.shape).requires_grad_()
        trained = [parameter for parameter in self.body.parameters() if parameter.requires_grad]
        wanted = [*trained, leaf] if needs_dx else trained
        if not wanted:
            return None
        with torch.enable_grad():
            y = self.body(leaf, run)
        found = torch.autograd.grad(y, wanted, dy[:, : y.shape[-1]].unflatten(0, run.segments.shape))
        for parameter, gradient in zip(trained, found, strict=False):
            gradient_of(parameter).add_(gradient)
        return found[-1].flatten(0, 1) if needs_dx else None

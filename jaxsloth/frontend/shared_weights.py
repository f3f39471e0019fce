"""What a native trainer trains is held twice: by the backend, which steps, and by PEFT's parameters, which the user's code
sees. Here is who is right when, and what brings the other up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from jaxsloth.backend import Step
from jaxsloth.frontend.adapters import native_adapter, native_spec, parts_by_name
from jaxsloth.frontend.arguments import warn_once
from jaxsloth.frontend.module.passes import to_torch
from jaxsloth.frontend.module.peft_adoption import Active, active_parts
from jaxsloth.models.names import trainable_shapes

ELSEWHERE = "TRL's trainer drives this module unchanged"


@dataclass(frozen=True)
class Kept:
    """An optimizer between two calls of train(), as transformers' Trainer keeps its own. parameters: all of the adapter's, of
    which it trains `held`; paused: those that were frozen for some of its steps."""

    kind: Any
    parameters: Mapping[str, nn.Parameter]
    held: frozenset[str]
    paused: frozenset[str]
    state: dict[str, np.ndarray]

    def fits(self, kind: Any, parameters: Mapping[str, nn.Parameter]) -> bool:
        same = self.kind == kind and self.parameters.keys() == parameters.keys()
        return same and all(self.parameters[name] is own for name, own in parameters.items())


class SharedWeights:
    """The trained tensors of one `train()`, by PEFT name. Wherever the user's code runs the module is right: `to_module` is
    called before it, and `to_backend` before the backend computes again, which takes over what was changed. Their
    requires_grad says what is trained.

    make_step: the backend's step, fresh; kind: what must be equal for an optimizer to be kept.

    Raises:
        ValueError: no active adapter, one that the backend can't train, nothing that requires a gradient, or hooks that would
            never be called.
    """

    def __init__(self, base: Any, kind: Any, kept: Kept | None) -> None:
        self._base, self._kind, self._model = base, kind, base.engine.model
        self.spec, values = native_adapter(base)
        self._parameters = self._now()
        trained = self._trained()
        if not trained:
            raise ValueError(
                "nothing of the active adapter requires a gradient, so there is nothing to train; load it with "
                "is_trainable=True, or set requires_grad"
            )
        _check_gradient_hooks(self._parameters)
        if kept is not None and not kept.fits(kind, self._parameters):
            kept = None
        self._held = frozenset(trained) if kept is None else kept.held
        self._paused = frozenset() if kept is None else kept.paused
        self._frozen: frozenset[str] | None = None
        self._suspended = None if kept is None else kept.state
        self._values = {name: torch.from_numpy(value) for name, value in values.items()}
        self._seen = self._copies()
        self._behind, self._elsewhere = False, True  # the module lags; the backend holds something else

    def begin(self, make_step: Callable[[], Step]) -> None:
        """Gives the backend what is to be trained, and makes the step."""
        self._make_step = make_step
        self._load()
        self._rebuild()
        self.to_backend()

    @property
    def held(self) -> dict[str, nn.Parameter]:
        """What the optimizer trains, by PEFT name."""
        return {name: parameter for name, parameter in self._parameters.items() if name in self._held}

    def _now(self, active: Active | None = None) -> dict[str, nn.Parameter]:
        """What is active, by name."""
        return parts_by_name(active or active_parts(self._base, self._model.spec), trainable_shapes(self.spec))

    def _trained(self) -> set[str]:
        return {name for name, parameter in self._parameters.items() if parameter.requires_grad}

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _load(self) -> None:
        values = {name: value.cpu().numpy() for name, value in self._values.items()}
        if self._model.spec == self.spec:
            self._model.load_trainable(values)
        else:
            self._model.add_adapters(self.spec, values)
        self._elsewhere = False

    def _backends(self) -> dict[str, torch.Tensor]:
        """What the backend holds, float32: its own memory where torch sees the device, to be let go of before the next step."""
        base: Any = self._base
        if base.engine.functional.device.startswith("cuda") and not torch.cuda.is_available():
            return {name: torch.from_numpy(value) for name, value in self._model.trainable().items()}
        stacks: dict[int, torch.Tensor] = {}
        found = {}
        for name, (array, place) in self._model.trained_arrays().items():
            if id(array) not in stacks:
                stacks[id(array)] = to_torch(array)
            found[name] = stacks[id(array)] if place is None else stacks[id(array)][place]
        return found

    def _rebuild(self) -> None:
        self.step = self._make_step()
        if self._suspended is not None:
            self.step.load_state(self._suspended)
        self._suspended, self._frozen = None, frozenset()

    def renew(self) -> None:
        """Makes the step anew; its optimizer goes on."""
        self._suspended = self.step.state()
        self._rebuild()
        self._freeze()

    def stepped(self) -> None:
        """The backend's weights are new."""
        self._behind, self._seen, self._values = True, {}, {}
        if self._frozen:
            self._paused |= self._frozen & self._held

    def to_module(self) -> None:
        if not self._behind:
            return
        held = self._backends()
        with torch.no_grad():
            torch._foreach_copy_(list(self._parameters.values()), [held[name] for name in self._parameters])
            self._seen = self._copies()
            self._values = {name: own if own.dtype == torch.float32 else held[name].clone() for name, own in self._seen.items()}
        if any(own.is_cuda for own in held.values()):
            torch.cuda.synchronize()  # the backend may give that memory away, and knows nothing of torch's stream
        self._behind = False

    def to_backend(self) -> None:
        """Takes over what the user's code did since `to_module`.

        Raises:
            ValueError: the adapter is not the active one any more, or was replaced; its layers were given scalings or dropout
                rates that differ; a tensor was frozen and is trained again.
        """
        if self._behind:
            return
        active = active_parts(self._base, self._model.spec)
        self._check_active(active)
        spec = native_spec(self._base, active)
        if spec != self.spec:  # another scaling, another dropout rate
            self.lend(rebuilds=True)
            self.spec = spec
        written = self._written()
        for name in written:
            self._seen[name] = self._parameters[name].detach().clone()
            self._values[name] = self._seen[name].float()
        if written or self._elsewhere:
            self._load()
        if self._suspended is not None:
            self._rebuild()
        self._freeze()

    def _written(self) -> list[str]:
        """What differs from what `to_module` left there."""
        own = [parameter.detach() for parameter in self._parameters.values()]
        with torch.no_grad():
            apart = torch._foreach_norm(torch._foreach_sub(own, list(self._seen.values())), float("inf"))
        # One number for each, in one transfer; not a number, where something isn't, is a difference too.
        return [name for name, most in zip(self._parameters, torch.stack(apart).tolist(), strict=True) if most != 0]

    def _freeze(self) -> None:
        trained = self._trained()
        fresh = sorted(trained - self._held)
        if fresh:
            warn_once(
                f"{fresh[0]} ({len(fresh)} in all) requires a gradient now and did not when the optimizer was made: it stays "
                "as it is, as in transformers' Trainer; make a new trainer to train it"
            )
        again = sorted(trained & self._paused)
        if again:
            raise ValueError(
                f"{again[0]} was frozen for some steps and requires a gradient again, and the optimizer here counts its steps "
                f"for all tensors together; make a new trainer, or take TRL's: {ELSEWHERE}"
            )
        frozen = frozenset(self._parameters) - (trained & self._held)
        if frozen != self._frozen:
            self.step.freeze(frozen)
            self._frozen = frozen

    def _check_active(self, active: Active) -> None:
        now = self._now(active)
        changed = next((name for name, own in self._parameters.items() if now.get(name) is not own), None)
        if changed is None and now.keys() == self._parameters.keys():
            return
        if changed is None:
            changed = next(iter(now.keys() - self._parameters.keys()))
        raise ValueError(
            f"the adapter that is trained must be active when a step begins, as it was when train() began, and {changed} is "
            "not the same any more (set_adapter, disable_adapter_layers, delete_adapter and the like in a callback); make it "
            "active again before the callback returns, or begin a new train()"
        )

    def show(self) -> bool:
        """For who is about to compute with what is active now: whether the backend holds it. Else it is lent: `lend`."""
        self.to_module()
        now = self._now()
        if now.keys() != self._parameters.keys() or any(now[name] is not own for name, own in self._parameters.items()):
            return False
        self.to_backend()
        return True

    def lend(self, rebuilds: bool) -> None:
        """The backend is about to be given something else; rebuilds: of another shape, which the step would not survive."""
        self._elsewhere = True
        if rebuilds and self._suspended is None:
            self._suspended = self.step.state()

    def end(self) -> Kept:
        """Brings the module up to date; the optimizer, for another train()."""
        self.to_module()
        state = self.step.state() if self._suspended is None else self._suspended
        return Kept(self._kind, self._parameters, self._held, self._paused, state)

    def rescue(self) -> Kept | None:
        """`end` after an error, as far as it goes: a JAX step that failed took the weights that it was to replace with it."""
        try:
            return self.end()
        except Exception:
            return None


def _check_gradient_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a gradient hook, which would never be called: gradients are formed and applied in the backend's "
                f"step. Remove it, or train with TRL's trainer: {ELSEWHERE}"
            )


_GRADIENTS = ("on_pre_optimizer_step", "on_optimizer_step")


class LookingHandler(CallbackHandler):
    """transformers' CallbackHandler, before whose callbacks the module is brought up to date, where they are the user's own.

    weights: those of the run at hand.
    """

    weights: SharedWeights | None = None

    def call_event(self, event: str, args: Any, state: Any, control: Any, **others: Any) -> Any:
        if self.weights is not None and any(_looks(callback, event) for callback in self.callbacks):
            self.weights.to_module()
        return super().call_event(event, args, state, control, **others)

    def adds_metrics(self) -> bool:
        """Whether a callback of the user's sees an evaluation's metrics, which it may add to."""
        return any(_looks(callback, "on_evaluate") for callback in self.callbacks)

    def check(self) -> None:
        """One warning where callbacks ask for gradients, which are never in the module."""
        for callback in self.callbacks:
            own = [event for event in _GRADIENTS if _looks(callback, event)]
            if own:
                warn_once(
                    f"{type(callback).__name__}.{own[0]} is called, but parameters have no .grad there: gradients are in the "
                    f"backend's step. To look at them train with TRL's trainer: {ELSEWHERE}"
                )


def _looks(callback: Any, event: str) -> bool:
    """Whether a callback has code of the user's at an event; transformers' own don't look at weights."""
    if event in vars(callback):
        return True
    function = getattr(type(callback), event, None)
    return getattr(function, "__module__", "").partition(".")[0] != TrainerCallback.__module__.partition(".")[0]

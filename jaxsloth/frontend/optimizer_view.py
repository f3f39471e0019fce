"""A native trainer's optimizer and schedule as callbacks know them: torch's own objects, of which the backend's step takes the
learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from jaxsloth.backend import OptimizerOptions
from jaxsloth.frontend.arguments import warn_once
from jaxsloth.frontend.trainer_config import max_norm
from jaxsloth.models.names import is_embedding

_ELSEWHERE = "TRL's trainer drives this module with torch's own optimizer"
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw_8bit"),
}
_READ_EVERY_STEP = ("lr", "initial_lr", "params")


def optimizer_options(args: Any, dtype: str) -> OptimizerOptions:
    """args.optim and its numbers as a backend takes them; ValueError for an optimizer that is not AdamW."""
    name = str(getattr(args.optim, "value", args.optim))
    if name not in OPTIMIZERS:
        raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {name!r}; others train with TRL's trainer")
    if name.startswith("paged_"):
        warn_once(f"optim={name!r}: nothing is paged, as the states of adapters are small; they stay on the device")
    return OptimizerOptions(
        name=OPTIMIZERS[name],  # type: ignore[arg-type]
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        max_grad_norm=max_norm(args),
        loss_scaling=dtype == "float16",
        embedding_rate=_embedding_rate(args),
    )


def _embedding_rate(args: Any) -> float:
    rate = getattr(args, "embedding_learning_rate", None)
    if rate is None:
        return 1.0
    if args.learning_rate == 0:
        raise ValueError(f"embedding_learning_rate={rate!r} follows learning_rate's schedule, which must be above 0, got 0")
    return rate / args.learning_rate


class BackendOptimizer(torch.optim.Optimizer):
    """The groups that transformers' Trainer makes: what decays, and the biases; where they have a rate of their own
    (`OptimizerOptions.embedding_rate`), the embedding and the head come last. Their "lr" is the next step's rate, whoever
    wrote it; whatever else is written is refused when that step begins.

    parameters: what is trained, by PEFT name.
    """

    def __init__(self, options: OptimizerOptions, learning_rate: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self._made = False
        parts: dict[str, list[nn.Parameter]] = {"decayed": [], "no_decay": [], "embedding": []}
        for name, own in parameters.items():
            apart = options.embedding_rate != 1.0 and is_embedding(name.split("."))
            parts["no_decay" if name.endswith("bias") else "embedding" if apart else "decayed"].append(own)
        groups: list[dict[str, Any]] = [
            {"params": parts["decayed"], "weight_decay": options.weight_decay},
            {"params": parts["no_decay"], "weight_decay": 0.0},
        ]
        self._factors = [1.0, 1.0]
        if parts["embedding"]:
            rate = learning_rate * options.embedding_rate
            groups.append({"params": parts["embedding"], "weight_decay": options.weight_decay, "lr": rate})
            self._factors.append(options.embedding_rate)
        super().__init__(groups, {"lr": learning_rate, "betas": options.betas, "eps": options.eps})
        self._made, self._opt_called = True, True  # the second: schedulers warn where no step came before theirs
        self._begun = [_fixed(group) for group in self.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        raise AttributeError(
            "the optimizer's moments are the backend's, and no parameter has them here; checkpoints hold them, in "
            f"state.safetensors. {_ELSEWHERE}"
        )

    @state.setter
    def state(self, value: Any) -> None:
        """torch sets an empty one."""

    def step(self, closure: Any = None) -> NoReturn:
        raise RuntimeError(
            f"optimizer.step() can't be called here: steps are the backend's, one after each batch. {_ELSEWHERE}"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._made:
            raise ValueError(f"a group can't be added: what is trained is chosen when train() begins. {_ELSEWHERE}")
        super().add_param_group(param_group)

    def rate(self) -> float:
        """The learning rate of the step that is about to begin.

        Raises:
            ValueError: the groups were given two rates, one that is no number from 0 on, or something else than a rate.
        """
        for begun, group in zip(self._begun, self.param_groups, strict=True):
            now = _fixed(group)
            for name in begun.keys() | now.keys():
                if begun.get(name) != now.get(name):
                    raise ValueError(
                        f"optimizer.param_groups: {name} was {begun.get(name)} when train() began and is {now.get(name)}; of a "
                        f"group only its lr can be written here. {_ELSEWHERE}"
                    )
        groups = [item for item in zip(self.param_groups, self._factors, strict=True) if item[0]["params"]]
        rates, factors = [float(group["lr"]) for group, _ in groups], [factor for _, factor in groups]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not all(
            math.isclose(rate * factors[0], rates[0] * factor, rel_tol=1e-9)
            for rate, factor in zip(rates, factors, strict=True)
        ):
            raise ValueError(
                "optimizer.param_groups: the groups' lr must be finite numbers from 0 on, to each other as "
                f"{' : '.join(map(str, factors))}, got {', '.join(map(str, rates))}"
            )
        return rates[0]


def _fixed(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the backend's optimizer was made with."""
    parameters = tuple(id(own) for own in group["params"])
    return {name: value for name, value in group.items() if name not in _READ_EVERY_STEP} | {"params": parameters}


def scheduler_of(args: Any, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """transformers' own scheduler of args.lr_scheduler_type.

    Raises:
        ValueError: its rates do not come from the step alone.
    """
    warmup = args.get_warmup_steps(total_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total_steps, args.lr_scheduler_kwargs)
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type {args.lr_scheduler_type} looks at the loss, and this trainer's rates come from the step alone; "
            "choose another, or train with TRL's trainer"
        )
    return scheduler


def go_on_from(scheduler: LambdaLR, step: int) -> None:
    """As if so many steps were done."""
    scheduler.last_epoch = step
    rates = [float(base) * of(step) for base, of in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list[Any](rates)

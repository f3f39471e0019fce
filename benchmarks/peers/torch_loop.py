"""The plain training loop around a PEFT model: what a careful user of Hugging Face or Unsloth writes."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.work import Work, adapters

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def limit_memory(work: Work) -> None:
    """Makes allocations over the work's limit fail as on a smaller device."""
    if work.memory_limit is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(work.memory_limit / total, 1.0))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Bytes allocated at most since restart_peak; on a CPU resident since the process began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeftRunner:
    """A `Runner` over a PEFT model: bf16 autocast, AdamW without decay, fused on a GPU, no clipping."""

    framework = "torch"

    def __init__(self, model: Any, work: Work) -> None:
        self.model, self._autocast = model, work.dtype == "bfloat16"
        if work.lora:
            self._parameters = {
                _own_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad
            }
            _load(self._parameters, adapters(work))
            self._optimizer = torch.optim.AdamW(
                self._parameters.values(), lr=work.learning_rate, weight_decay=0.0, fused=torch.cuda.is_available()
            )
        restart_peak()

    def step(self, ids: np.ndarray) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        inputs = torch.from_numpy(ids).to(device(), torch.int64)
        with torch.autocast(device().type, torch.bfloat16, enabled=self._autocast):
            loss = self.model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        synchronize()
        return float(loss.detach())

    def gradients(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: self._gradient(name).float().cpu().numpy() for name in names}

    def _gradient(self, name: str) -> torch.Tensor:
        gradient = self._parameters[name].grad
        if gradient is None:
            raise RuntimeError(f"{name} has no gradient; was a step made?")
        return gradient

    def peak_memory(self) -> int | None:
        return peak_memory()


def _own_name(name: str) -> str:
    """The adapter file's name of a parameter, which PEFT keeps under its adapter's name."""
    return name.replace(".default.weight", ".weight")


def _load(parameters: dict[str, torch.nn.Parameter], values: dict[str, np.ndarray]) -> None:
    """Overwrites the adapters in place.

    Raises:
        RuntimeError: the model does not train exactly these tensors, so that its speed would be of other work.
    """
    if parameters.keys() != values.keys():
        odd = sorted(parameters.keys() ^ values.keys())
        raise RuntimeError(f"the model must train {len(values)} adapter tensors; {len(odd)} names differ, as {odd[:3]}")
    with torch.no_grad():
        for name, value in values.items():
            if parameters[name].dtype != torch.float32:
                raise RuntimeError(f"{name} must be float32, and it is {parameters[name].dtype}")
            parameters[name].copy_(torch.from_numpy(value))

"""A change of a module that succeeds, or leaves everything as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from jaxsloth.frontend.module.placeholders import Placeholder

_CONTAINERS = (dict, list, set)  # what modules keep their own settings in, and torch its parameters, children and hooks


@contextmanager
def as_before(root: nn.Module, *, values: bool = True) -> Iterator[None]:
    """Where its block raises, every module under `root` has the children, parameters, settings and hooks that it had.

    values: also the parameters' values, which are copied for that; placeholders have none.
    """
    held = [(module, _settings(module)) for module in root.modules()]
    own = [parameter for parameter in root.parameters() if not isinstance(parameter, Placeholder)]
    flags = [(parameter, parameter.requires_grad) for parameter in own]
    copies = [(parameter, parameter.detach().clone()) for parameter in own] if values else []
    try:
        yield
    except BaseException:
        for module, settings in held:
            _put_back(module, settings)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for parameter, value in copies:
                parameter.copy_(value)
        raise


def _settings(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of its content where it is a container."""
    found = vars(module).items()
    return {name: (value, value.copy() if isinstance(value, _CONTAINERS) else None) for name, value in found}


def _put_back(module: nn.Module, settings: dict[str, tuple[Any, Any]]) -> None:
    own = vars(module)
    for name in own.keys() - settings.keys():
        del own[name]
    for name, (value, content) in settings.items():
        own[name] = value
        if isinstance(value, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)

"""Parameters whose values are elsewhere: of the right shape, dtype and device, and one element of memory.

Whoever asks for the values gets the base's: reading one (to save it, to hash it, to compute with it) makes the tensor from the
backend, dequantized where the base is, every time anew. What needs no values (detach, a cast) gives a placeholder. Writing is
refused, since nothing would come of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

Base = Callable[[], torch.Tensor]
# What is answered by the placeholder itself; all getters of attributes are, too, but those below.
_OWN = {
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "__len__", "storage_offset", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_shared", "is_pinned", "is_inference", "is_signed", "__hash__"),
    *("data_ptr", "untyped_storage", "storage", "__set__", "__delete__", "register_hook"),
}
_READING_GETTERS = {"T", "mT", "H", "mH", "real", "imag"}
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


class PlaceholderWriteError(RuntimeError):
    """Something would write into the base, whose weights are not in torch."""


def _refusal(name: str) -> PlaceholderWriteError:
    return PlaceholderWriteError(
        f"{name} can't be written (a merge, an init that changes the base such as PiSSA): the base weights of this model are "
        "not in torch; save_pretrained_merged writes the merged model, from which it can be loaded again"
    )


@cache
def tell_of_casts() -> None:
    """A UserWarning, once a process."""
    warnings.warn(
        "casting the base's weights (as PEFT's prepare_model_for_kbit_training does) changes what they are shown as; the "
        "backend computes in the dtype that the model was loaded with, its norms, softmax and loss in float32 anyway",
        UserWarning,
        stacklevel=3,
    )


class Placeholder(nn.Parameter):
    """A base weight, made by `base` (float32) whenever it is read. tensor_name: the base's name of it."""

    tensor_name: str
    base: Base
    held: torch.dtype  # what the model computes with; a cast shows another
    _asked = False

    @classmethod
    def over(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, name: str, base: Base) -> Placeholder:
        with torch._C.DisableTorchFunctionSubclass():
            element = torch.full((1,), torch.nan, dtype=dtype, device=device).expand(tuple(shape))
            made = torch.Tensor._make_subclass(cls, element, False)
        made.tensor_name, made.base, made.held = name, base, dtype
        return made

    def whole(self) -> torch.Tensor:
        """The values."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.base().to(self.device, self.held).to(self.dtype)

    def like(self, dtype: torch.dtype | None = None) -> Placeholder:
        """Another placeholder of the same weight."""
        made = type(self).over(self.shape, dtype or self.dtype, self.device, self.tensor_name, self.base)
        made.held = self.held
        return made

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether somebody asked for it. No gradient is made; passes of the model refuse it."""
        return self._asked

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        self._asked = trained

    def requires_grad_(self, requires_grad: bool = True) -> Placeholder:
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> Placeholder:  # type: ignore[override]
        return self.like()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """A cast of itself changes what it is shown as, as PEFT's prepare_model_for_kbit_training has it."""
        if not _same(self, value):
            raise _refusal(self.tensor_name)
        if not isinstance(value, Placeholder):
            return
        if value.dtype != self.dtype:
            tell_of_casts()
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, torch.Tensor.data.__get__(value))  # type: ignore[attr-defined]

    def detach(self) -> Placeholder:  # type: ignore[override]
        return self.like()

    def __deepcopy__(self, memo: Any) -> Placeholder:
        return self.like()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.tensor_name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        getter = name == "__get__" and getattr(func.__self__, "__name__", "") not in _READING_GETTERS
        with torch._C.DisableTorchFunctionSubclass():
            if getter or name in _OWN:
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, Placeholder):
            cast = _cast(name, first, args[1:], kwargs)
            if cast is not None:
                return first.like(cast)
            if _writes(name):
                if name == "copy_" and _same(first, args[1]):
                    return first  # load_state_dict of its own state
                raise _refusal(first.tensor_name)
        if isinstance(kwargs.get("out"), Placeholder):
            raise _refusal(kwargs["out"].tensor_name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_read(args), **_read(kwargs))


def _same(weight: Placeholder, value: Any) -> bool:
    """Whether a value is the weight's own."""
    if isinstance(value, Placeholder):
        return value.base is weight.base
    if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
        return False
    return torch.equal(value.to(weight.device, weight.dtype), weight.whole())


def _writes(name: str) -> bool:
    """Names of torch's that end so write into their first argument, and so do ``+=`` and its like, and ``t[i] = x``."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__"))


def _cast(name: str, tensor: Placeholder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype, where all that is asked for is one."""
    if name in _CASTS and not args and not kwargs:
        return _CASTS[name]
    asked = args[0] if len(args) == 1 and not kwargs else kwargs.get("dtype") if not args and set(kwargs) == {"dtype"} else None
    return asked if name in ("to", "type") and isinstance(asked, torch.dtype) and asked.is_floating_point else None


def _read(value: Any) -> Any:
    """Arguments with the values in the placeholders' place."""
    if isinstance(value, Placeholder):
        return value.whole()
    if isinstance(value, dict):
        return {key: _read(part) for key, part in value.items()}
    return type(value)(_read(part) for part in value) if type(value) in (tuple, list) else value


class PlaceholderBias(Placeholder):
    """A placeholder that becomes a plain parameter with the base's values, float32, once it is to be trained.

    PEFT marks the biases that it trains (bias="all", "lora_only") by requires_grad and by nothing else, and who makes an
    optimizer next must find them whole: so this is where it happens.
    """

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return False

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        if trained:
            values = self.whole().float()
            del self.base, self.tensor_name
            self.__class__ = nn.Parameter  # type: ignore[assignment]  (as torch's own lazy parameters do)
            self.data = values
            self.requires_grad = True


class SharedWeight(nn.Parameter):
    """A weight over the backend's own memory: read as it lies there, and not to be replaced."""

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """A cast of itself changes nothing."""
        if value.shape != self.shape or not torch.equal(value.to(self.device, self.dtype), self.detach()):
            raise _refusal("the head's weight")
        if value.dtype != self.dtype:
            tell_of_casts()


class Placeholders:
    """Makes the parameters of one model's skeleton. base: a tensor of the base by name, float32, in memory of its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device, base: Callable[[str], torch.Tensor]) -> None:
        self._dtype, self._device, self._base = dtype, device, base

    def parameter(self, name: str, *shape: int) -> Placeholder:
        return Placeholder.over(shape, self._dtype, self._device, name, partial(self._base, name))

    def bias(self, name: str, width: int) -> Placeholder:
        return PlaceholderBias.over((width,), self._dtype, self._device, name, partial(self._base, name))

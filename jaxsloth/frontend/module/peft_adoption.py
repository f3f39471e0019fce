"""PEFT's LoRA layers, biases and modules to save, read anew at every pass: which adapter is active, its weights, its scaling.
What the backends can't do is refused here, with the reason, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jaxsloth.frontend.module.placeholders import Placeholder, PlaceholderBias
from jaxsloth.frontend.module.skeleton import PlaceholderLinear, PlaceholderModule
from jaxsloth.models.names import FINAL_NORM, linears, norms
from jaxsloth.models.spec import ModelSpec
from jaxsloth.transforms import SAVEABLE

LAYERS = "model.layers"
_ONLY = (
    "of PEFT's methods only LoRA on the linear layers of the blocks, their biases, and modules_to_save of the embedding and "
    "the head, are trained through this model"
)


class PeftFeatureError(ValueError):
    """PEFT did something to the model that its backend can't compute."""


class RowAdaptersError(PeftFeatureError):
    """PEFT was given an adapter for every row."""


@dataclass(frozen=True)
class PeftAdapter:
    """The active adapter of one layer: A ``[r, in]`` and B ``[out, r]``, PEFT's own parameters. dropout: the rate in training,
    which the layer is in or not."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float
    training: bool

    def versions(self) -> tuple[int, int]:
        """Other ones after A or B were written in place."""
        return self.a._version, self.b._version


@dataclass(frozen=True)
class Active:
    """What PEFT has active: adapters by the layer's name, and what stands whole in place of a base tensor (an embedding or a
    head ``[vocab, hidden]``, a bias ``[out]``) by the tensor's name."""

    adapters: Mapping[str, PeftAdapter]
    full_weights: Mapping[str, nn.Parameter]

    def versions(self) -> list[Any]:
        """Other ones after any of it was written in place."""
        return [*(own.versions() for own in self.adapters.values()), *(own._version for own in self.full_weights.values())]

    def __bool__(self) -> bool:
        return bool(self.adapters or self.full_weights)


def active_parts(root: nn.Module, spec: ModelSpec) -> Active:
    """What is to be run with; what is disabled is left out. Biases can't be: PEFT trains the layers' own, whichever adapter is
    active then, so they are as they were trained even where no adapter is.

    Raises:
        PeftFeatureError: a layer was wrapped by something else than plain LoRA, replaced or moved; something of the base is to
            be trained or was written; anything has hooks or a forward of its own, which would never be called.
    """
    try:
        return _found(root, spec)
    except RowAdaptersError:
        _drop_row_adapters(root)
        raise


def _found(root: nn.Module, spec: ModelSpec) -> Active:
    norm_names = [name for index in range(len(spec.layers)) for name in norms(spec, index)]
    find = _Finder(root)
    for name in (FINAL_NORM, *norm_names):
        _check_leaf(name, find(name))
    count = len(find(LAYERS)._modules)
    if count != len(spec.layers):
        raise PeftFeatureError(
            f"{LAYERS} must have the {len(spec.layers)} layers that the backend computes, and it has {count} "
            "(layer_replication, or a list that was cut or prolonged); load a checkpoint of that depth"
        )
    saved = {f"{name}.weight": _saved(name, find(name)) for name in SAVEABLE}
    full_weights = {name: weight for name, weight in saved.items() if weight is not None}
    found: dict[str, PeftAdapter] = {}
    for linear in linears(spec):
        layer = find(linear.name)
        lora = None if isinstance(layer, PlaceholderLinear) else _plain_lora(linear.name, layer)
        leaf = layer if lora is None else lora._modules["base_layer"]
        _check_leaf(linear.name, leaf)
        bias: Any = leaf._parameters.get("bias")
        if _is_own(bias):
            full_weights[f"{linear.name}.bias"] = bias
        adapter = None if lora is None else _active(linear.name, lora)
        if adapter is not None:
            found[linear.name] = adapter
    return Active(found, full_weights)


def _is_own(bias: nn.Parameter | None) -> bool:
    """Whether a layer's bias is, or was, trained: no placeholder any more."""
    return bias is not None and type(bias) is not PlaceholderBias


class _Finder:
    """Finds modules by name, each owner once. What this file reads of hundreds of layers at every pass it reads from the dicts
    that torch keeps them in: attributes of modules are slow, and would take some percent of a step."""

    def __init__(self, root: nn.Module) -> None:
        self._owners: dict[str, Any] = {"": root._modules}

    def __call__(self, name: str) -> Any:
        owner, _, own = name.rpartition(".")
        if owner not in self._owners:
            module = self(owner)
            self._check(owner, module)
            self._owners[owner] = module._modules
        found = self._owners[owner].get(own)
        if found is None:
            raise PeftFeatureError(
                f"{name} is not in the model any more (a block, or a list of them, was replaced or cut); the backend computes "
                "all of the checkpoint's layers as they are"
            )
        return found

    def _check(self, name: str, module: Any) -> None:
        if "." in name and type(module) not in (nn.Module, nn.ModuleList):
            raise PeftFeatureError(
                f"{name} was replaced by a {type(module).__name__}, which would never be called; the backend computes all of "
                "the checkpoint's layers as they are"
            )
        _check_hooks(name, module)


def _check_leaf(name: str, leaf: Any) -> None:
    if not isinstance(leaf, PlaceholderModule):
        raise PeftFeatureError(
            f"{name} was replaced by a {type(leaf).__name__} (modules_to_save, trainable_token_indices, or a target that is no "
            f"linear layer of a block); {_ONLY}"
        )
    if leaf.called != name:
        raise PeftFeatureError(
            f"{name} is {leaf.called}, which was put in its place (layers swapped or shared); the backend computes all of the "
            "checkpoint's layers as they are"
        )
    for part, parameter in leaf._parameters.items():
        if parameter is None or (part == "bias" and _is_own(parameter)):
            continue
        if parameter.requires_grad:
            raise PeftFeatureError(f"{name}.{part} requires a gradient (full fine-tuning, an unfrozen base); {_ONLY}")
        if not leaf.shared and not isinstance(parameter, Placeholder):
            raise PeftFeatureError(
                f"{name}.{part} was replaced by another parameter, but the base weights are not in torch; load the model again "
                "and leave that out"
            )
    _check_hooks(name, leaf)


def _drop_row_adapters(root: nn.Module) -> None:
    """Removes the hooks that PEFT leaves where the pass that they were for fails: every later pass would find them."""
    for module in root.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if _name_of(hook) == _ROW_ADAPTERS]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _name_of(hook: Any) -> str:
    inner = getattr(hook, "func", hook)  # PEFT's are partial functions
    return getattr(inner, "__qualname__", repr(inner))


_ROW_ADAPTERS = "_adapter_names_pre_forward_hook"
# torch's dicts of what runs when a module is called, or its gradient comes.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_hooks(name: str, module: Any) -> None:
    """That nothing was put around a module's forward, which is never called."""
    own = module.__dict__
    if "forward" in own:
        raise PeftFeatureError(f"{name}.forward was replaced, and would never be called, since no module runs by itself")
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]):
        return
    for hook in (hook for kind in _HOOKS for hook in own[kind].values()):
        called = _name_of(hook)
        if called == _ROW_ADAPTERS:
            raise RowAdaptersError(
                "adapter_names (an adapter for every row) and alora_offsets are not supported; run each adapter's rows by "
                "themselves, with set_adapter"
            )
        if called.rpartition(".")[2] != "make_inputs_require_grads":
            raise PeftFeatureError(
                f"{name} has a hook ({called}), which would never be called, since no module runs by itself; remove it, and "
                "switch off what set it (neftune_noise_alpha does)"
            )


def check_wrappers(model: nn.Module, root: nn.Module) -> None:
    """That no hooks are on what stands around the blocks: a native trainer calls none of it.

    Raises:
        PeftFeatureError: names the module.
    """
    for name, module in model.named_modules():
        if any(inner is root for inner in module.modules()):
            for kind in _HOOKS:
                if module.__dict__[kind]:
                    raise PeftFeatureError(
                        f"{name or type(module).__name__} has a hook, which this trainer would never call: its steps are the "
                        "backend's own. Remove it, or train with TRL's trainer, which drives this module unchanged"
                    )
        if module is root:
            return


def _saved(name: str, module: Any) -> nn.Parameter | None:
    """The weight that PEFT's modules_to_save has put in place of the base's, where it is active."""
    from peft.utils.other import ModulesToSaveWrapper

    if type(module) in (nn.Embedding, nn.Linear):  # PEFT's unload() leaves there what was trained whole
        _check_hooks(name, module)
        return module._parameters["weight"]
    if type(module) is not ModulesToSaveWrapper:
        _check_leaf(name, module)
        return None
    copies = module._modules["modules_to_save"]._modules  # type: ignore[union-attr]
    _check_leaf(name, module._modules["original_module"])
    _check_hooks(name, module)
    active = [adapter for adapter in module.active_adapters if adapter in copies]
    if module.disable_adapters or not active:
        return None
    chosen = copies[active[0]]
    _check_hooks(name, chosen)
    return chosen._parameters["weight"]  # type: ignore[union-attr]


def _active(name: str, lora: Any) -> PeftAdapter | None:
    _check_hooks(name, lora)
    if lora.merged:
        raise PeftFeatureError(f"{name}: its adapter is merged, but the base weights are not in torch; call unmerge_adapter()")
    if lora.disable_adapters:
        return None
    parts = lora._modules
    of_a, of_b = parts["lora_A"]._modules, parts["lora_B"]._modules
    active = [adapter for adapter in lora.active_adapters if adapter in of_a]
    if not active:
        return None
    if len(active) > 1:
        raise PeftFeatureError(f"{name}: one adapter can be active at a time, and these are: {active}; call set_adapter(one)")
    chosen = active[0]
    if chosen in lora.lora_variant:
        variant = type(lora.lora_variant[chosen]).__name__
        raise PeftFeatureError(f"{name}: the LoRA variant {variant} (use_dora and the like) is not supported; use plain LoRA")
    if lora.lora_bias.get(chosen):
        raise PeftFeatureError(f"{name}: lora_bias=True is not supported; use lora_bias=False")
    dropout = parts["lora_dropout"]._modules[chosen]
    for part, module, plain in (
        ("lora_A", of_a[chosen], nn.Linear),
        ("lora_B", of_b[chosen], nn.Linear),
        ("lora_dropout", dropout, type(dropout) if type(dropout) in (nn.Dropout, nn.Identity) else nn.Dropout),
    ):
        if type(module) is not plain:
            raise PeftFeatureError(f"{name}.{part}.{chosen} was replaced by a {type(module).__name__}; {_ONLY}")
        _check_hooks(f"{name}.{part}.{chosen}", module)
    rate = dropout.p if type(dropout) is nn.Dropout else 0.0
    a, b = of_a[chosen]._parameters["weight"], of_b[chosen]._parameters["weight"]
    return PeftAdapter(a, b, _scaling(name, lora.scaling[chosen]), rate, lora.training)


def _scaling(name: str, value: Any) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    learnt = isinstance(value, torch.Tensor) and value.requires_grad
    try:
        number = math.nan if learnt else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PeftFeatureError(f"{name}: scaling must be a finite number that is not learnt, got {value!r}")
    return number


def _plain_lora(name: str, layer: nn.Module) -> Any:
    from peft.tuners.lora import Linear

    plain = type(layer) is Linear and isinstance(layer._modules["base_layer"], PlaceholderLinear)
    if not plain or layer.fan_in_fan_out:
        raise PeftFeatureError(
            f"{name} was replaced by a {type(layer).__module__}.{type(layer).__name__}; {_ONLY} (peft.LoraConfig)"
        )
    return layer

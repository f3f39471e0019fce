"""A built model of the torch backend: names in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import torch

from jaxsloth.backend import (
    PLAIN,
    BuildOptions,
    CheckpointingName,
    OptimizerOptions,
    PreferenceOptions,
    Regularization,
    TensorSource,
)
from jaxsloth.batch import Batch
from jaxsloth.convert.fitting import cast_error
from jaxsloth.convert.peft_adapter import check_values
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, NF4, QUANTIZE, Nested
from jaxsloth.kernels.registry import Facts, check_requested, resolve
from jaxsloth.models.names import lora_names, own_name, tensor_shapes, trainable_shapes
from jaxsloth.models.spec import ModelSpec
from jaxsloth.torch_backend import fp8, placement
from jaxsloth.torch_backend.bridge import Bridge
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.generate import DecodeState
from jaxsloth.torch_backend.layers import Linear, Ops
from jaxsloth.torch_backend.objective import SUMMED, make_context, summed_loss
from jaxsloth.torch_backend.optimizer import Flat
from jaxsloth.torch_backend.preference import PreferenceStep, make_row_log_probs
from jaxsloth.torch_backend.state import ModelState
from jaxsloth.torch_backend.train_step import EvalStep, TrainStep, make_eval_step, make_train_step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchModel(ModelState):
    """See `jaxsloth.backend.Model`. `decoder` is the nn.Module."""

    def __init__(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> None:
        device = placement.device()
        facts = Facts(device.type, options.dtype, {"hidden": spec.hidden})  # type: ignore[arg-type]
        take = _loader(spec, source, device, DTYPES[options.dtype])
        check_requested(options.implementations or {})
        fp8.check_options(options, device)
        ops = Ops(facts, options.implementations or {})
        recompute = options.gradient_checkpointing not in ("none", "auto")
        super().__init__(spec, options, Decoder(spec, take, ops, DTYPES[options.dtype], recompute))

    def add_adapters(self, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> None:
        if spec.lora is None or replace(spec, lora=None) != replace(self.spec, lora=None):
            raise ValueError("add_adapters takes this model's own spec with adapters added (jaxsloth.transforms.add_lora)")
        check_values(values, trainable_shapes(spec), "the adapter")
        self.spec = self.decoder.spec = spec
        self._flat, self._fast = Flat(values, self.decoder.device), None
        parameters = self._flat.parameters
        for linear in self.decoder.linears():
            linear.swap_adapter((None, None, 1.0, 0.0))  # what an adapter of before had
        for name, tensor in self._base.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.decoder.get_submodule(owner), attribute, tensor)
        for module in spec.lora.modules:
            a, b = lora_names(module)
            linear = self.decoder.get_submodule(module)
            assert isinstance(linear, Linear)
            linear.add_adapter(spec.lora, parameters[a], parameters[b])
        base = tensor_shapes(spec)
        for name, parameter in parameters.items():
            if own_name(name) in base:  # a bias, or a module trained whole
                owner, _, attribute = own_name(name).rpartition(".")
                setattr(self.decoder.get_submodule(owner), attribute, parameter)

    def trainable(self) -> dict[str, np.ndarray]:
        flat = self.flat()
        values = flat.read(flat.buffer)
        return {name: values[name] for name in trainable_shapes(self.spec)}

    def load_trainable(self, values: Mapping[str, np.ndarray]) -> None:
        check_values(values, trainable_shapes(self.spec), "the adapter")
        flat = self.flat()
        flat.load(flat.buffer, values)

    def base_tensor(self, name: str) -> np.ndarray:
        if name in self._base:
            return self._base[name].detach().float().cpu().numpy()
        owner, _, attribute = name.rpartition(".")
        module = self.decoder.get_submodule(owner)
        if isinstance(module, Linear) and attribute == "weight":
            base = module.base()
            if isinstance(base, NF4):
                facts = Facts(base.codes.device.type)  # type: ignore[arg-type]
                return resolve(DEQUANTIZE, "torch", facts)(base, torch.float32).cpu().numpy()
        return getattr(module, attribute).detach().float().cpu().numpy()

    def quantized_tensor(self, name: str) -> NF4:
        module = self.decoder.get_submodule(name.removesuffix(".weight"))
        base = module.base() if isinstance(module, Linear) else None
        if not isinstance(base, NF4):
            raise ValueError(f"{name} is not quantized")
        return _map_nf4(lambda tensor: tensor.cpu().numpy(), base)

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        ids = torch.from_numpy(batch.input_ids).to(self.decoder.device)
        return self.decoder.logits(self.decoder.hidden(ids, make_context(self.decoder, batch))).cpu().numpy()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        flat = self.flat()
        flat.gradient.zero_()
        fast, count = self.fast_pass(), batch.valid_tokens()
        if fast is None:
            loss = summed_loss(self.decoder, batch, None) / count
            loss.backward()
        else:
            fast.begin(batch.input_ids.size)
            loss = fast.add_gradients(batch, SUMMED, {"factor": torch.tensor(1.0 / count, device=self.decoder.device)}) / count
        gradients = flat.read(flat.gradient)
        return float(loss.detach()), {name: gradients[name] for name in trainable_shapes(self.spec)}

    def set_gradient_checkpointing(self, name: CheckpointingName) -> None:
        self.options, self._fast = replace(self.options, gradient_checkpointing=name), None
        self.decoder._recompute = name not in ("none", "auto")

    def train_step(self, options: OptimizerOptions, regularization: Regularization = PLAIN) -> TrainStep:
        self.idle_step = None  # its caches' memory is for training now
        return make_train_step(self, options, regularization)

    def preference_step(self, options: OptimizerOptions, preference: PreferenceOptions) -> PreferenceStep:
        self.idle_step = None
        return PreferenceStep(self, options, preference)

    def eval_step(self, label_smoothing: float = 0.0) -> EvalStep:
        return make_eval_step(self, label_smoothing)

    def row_log_probs(self, adapters: bool = True) -> Callable[[Batch], np.ndarray]:
        return make_row_log_probs(self, adapters)

    def bridge(self) -> Bridge:
        return Bridge(self)

    def start_decode(self, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[DecodeState, np.ndarray]:
        state = DecodeState(self, input_ids, lengths, capacity)
        return state, state.first_logits


def _loader(
    spec: ModelSpec, source: TensorSource, device: torch.device, dtype: torch.dtype
) -> Callable[[str], torch.Tensor | NF4]:
    """A function that hands over one base tensor at a time: checked, on the device, quantized where the spec says."""
    shapes, present = tensor_shapes(spec), set(source.names())
    nested = spec.quantization.nested if spec.quantization is not None else False
    quantized = {f"{module}.weight" for module in spec.quantization.modules} if spec.quantization is not None else set()
    quantize = resolve(QUANTIZE, "torch", Facts(device.type))  # type: ignore[arg-type]

    def take(name: str) -> torch.Tensor | NF4:
        if name not in present:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        if tuple(source.shape(name)) != shapes[name]:
            raise ValueError(f"tensor {name} must have the shape {shapes[name]}, and it has {tuple(source.shape(name))}")
        value = source.read(name)
        if isinstance(value, NF4):
            return _map_nf4(lambda array: torch.from_numpy(np.array(array)).to(device), value)
        tensor = to_torch(value).to(device)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds NaN or infinite values; the checkpoint is damaged")
        stored = torch.float32 if name in quantized else dtype
        if torch.finfo(tensor.dtype).max > torch.finfo(stored).max:
            lost = ~torch.isfinite(tensor.to(stored))
            if lost.any():
                raise cast_error(name, int(lost.sum()), float(tensor[lost][0]), str(stored).removeprefix("torch."))
        return quantize(tensor, nested=nested) if name in quantized else tensor.to(dtype)

    return take


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same bits; bfloat16, which numpy has not of its own, crosses as integers."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _map_nf4(function: Callable[[Any], Any], quantized: NF4) -> NF4:
    nested = quantized.nested
    if nested is not None:
        nested = Nested(function(nested.absmax), function(nested.offset), function(nested.code))
    return NF4(function(quantized.codes), function(quantized.absmax), nested, quantized.shape)

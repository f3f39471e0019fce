"""A built model of the torch backend: names in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from jaxsloth.backend import BuildOptions, CheckpointingName, OptimizerOptions, TensorSource
from jaxsloth.batch import Batch
from jaxsloth.convert.peft_adapter import check_values
from jaxsloth.kernels.nf4.contract import DEQUANTIZE, NF4
from jaxsloth.kernels.registry import RefusedError, Target, check_requested, resolve
from jaxsloth.models.names import lora_names, own_name, tensor_shapes, trainable_shapes
from jaxsloth.models.spec import ModelSpec
from jaxsloth.objectives.causal_lm import CausalLoss
from jaxsloth.objectives.objective import Objective
from jaxsloth.torch_backend import autograd_pass, devices, fp8
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.functional_model import FunctionalModel
from jaxsloth.torch_backend.generate import DecodeState
from jaxsloth.torch_backend.linear import Linear, Nf4Weight
from jaxsloth.torch_backend.ops import Ops
from jaxsloth.torch_backend.optimizer import Flat
from jaxsloth.torch_backend.state import ModelState
from jaxsloth.torch_backend.step import EvalStep, Step, make_row_log_probs
from jaxsloth.torch_backend.weights import loader, map_nf4
from jaxsloth.torch_backend.written_pass import describe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_ops(spec: ModelSpec, options: BuildOptions) -> Ops:
    """The ops of a model; RefusedError where the options ask for what is not here."""
    check_requested(options.implementations or {})
    device = devices.device()
    fp8.check_options(options, device)
    return Ops(Target(device.type, options.dtype, {"hidden": spec.hidden}), options.implementations or {})  # type: ignore[arg-type]


class TorchModel(ModelState):
    """See `jaxsloth.backend.Model`. `decoder` is the nn.Module."""

    def __init__(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> None:
        get_weight = loader(spec, source, devices.device(), DTYPES[options.dtype])
        ops = make_ops(spec, options)
        recompute = options.gradient_checkpointing not in ("none", "auto")
        super().__init__(spec, options, Decoder(spec, get_weight, ops, DTYPES[options.dtype], recompute))

    def add_adapters(self, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> None:
        if spec.lora is None or replace(spec, lora=None) != replace(self.spec, lora=None):
            raise ValueError("add_adapters takes this model's own spec with adapters added (jaxsloth.transforms.add_lora)")
        check_values(values, trainable_shapes(spec), "the adapter")
        self.spec = self.decoder.spec = spec
        self._flat, self._program = Flat(values, self.decoder.device), None
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

    def trained_arrays(self) -> dict[str, tuple[Any, int | None]]:
        flat = self.flat()
        return {name: (flat.view(flat.buffer, name), None) for name in trainable_shapes(self.spec)}

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
            base = module.base
            if isinstance(base, Nf4Weight):
                target = Target(module.weight.device.type)  # type: ignore[arg-type]
                return resolve(DEQUANTIZE, "torch", target)(base.value, torch.float32).cpu().numpy()
        return getattr(module, attribute).detach().float().cpu().numpy()

    def quantized_tensor(self, name: str) -> NF4:
        module = self.decoder.get_submodule(name.removesuffix(".weight"))
        base = module.base if isinstance(module, Linear) else None
        if not isinstance(base, Nf4Weight):
            raise ValueError(f"{name} is not quantized")
        return map_nf4(lambda tensor: tensor.cpu().numpy(), base.value)

    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        ids = torch.from_numpy(batch.input_ids).to(self.decoder.device)
        return (
            self.decoder.lm_head(autograd_pass.hidden(self.decoder, ids, autograd_pass.run_of(self.decoder, batch)))
            .cpu()
            .numpy()
        )

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        flat = self.flat()
        flat.gradient.zero_()
        program, count = self.written_program(), batch.valid_tokens()
        if program is None:
            loss = autograd_pass.losses(self.decoder, batch, None, per_token=False)[0] / count
            loss.backward()
        else:
            program.begin(batch.input_ids.size)
            factor = torch.tensor(1.0 / count, device=self.decoder.device)
            loss = program.add_gradients(batch, CausalLoss(), {"factor": factor}) / count
        gradients = flat.read(flat.gradient)
        return float(loss.detach()), {name: gradients[name] for name in trainable_shapes(self.spec)}

    def set_gradient_checkpointing(self, name: CheckpointingName) -> None:
        self.options, self._program = replace(self.options, gradient_checkpointing=name), None
        self.decoder.recompute = name not in ("none", "auto")

    def step(self, objective: Objective, optimizer: OptimizerOptions) -> Step:
        self.idle_program = None  # its caches' memory is for training now
        return Step(self, objective, optimizer)

    def eval_step(self, label_smoothing: float = 0.0) -> EvalStep:
        return EvalStep(self, label_smoothing)

    def row_log_probs(self, adapters: bool = True) -> Callable[[Batch], np.ndarray]:
        return make_row_log_probs(self, adapters)

    def functional(self) -> FunctionalModel:
        return FunctionalModel(self)

    def start_decode(self, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> DecodeState:
        return DecodeState(self, input_ids, lengths, capacity)


def training_passes(spec: ModelSpec, options: BuildOptions) -> list[str]:
    """See `jaxsloth.backend.Backend`; its modules hold tensors without storage."""
    shapes, dtype, ops = tensor_shapes(spec), DTYPES[options.dtype], make_ops(spec, options)
    decoder = Decoder(spec, lambda name: torch.empty(shapes[name], dtype=dtype, device="meta"), ops, dtype, recompute=False)
    adapters = trainable_shapes(spec)
    for module in spec.lora.modules if spec.lora is not None else ():
        a, b = (torch.nn.Parameter(torch.empty(adapters[name], device="meta")) for name in lora_names(module))
        linear = decoder.get_submodule(module)
        assert isinstance(linear, Linear) and spec.lora is not None
        linear.add_adapter(spec.lora, a, b)
    reason = fp8.layer_refusal(decoder.linears()) if options.compute == "fp8" else None
    if reason is not None:
        raise RefusedError(f"compute fp8 can't train this model: it {reason}; set compute: exact")
    return describe(decoder)

"""The written pass for batches from the host: the mode that fits, and CUDA graphs where they pay."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from jaxsloth.backend import BuildOptions, CheckpointingName, ComputeName
from jaxsloth.batch import IGNORE, Batch
from jaxsloth.kernels.attention.library_ops import Layout, boundaries_of
from jaxsloth.kernels.registry import RefusedError, choose_written
from jaxsloth.models.memory import first_fitting
from jaxsloth.models.names import trainable_shapes
from jaxsloth.models.spec import ModelSpec
from jaxsloth.objectives.objective import Objective
from jaxsloth.torch_backend import fp8
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.devices import free_memory, host_memory, to_device
from jaxsloth.torch_backend.objective import Tensors
from jaxsloth.torch_backend.run import DropoutKey
from jaxsloth.torch_backend.written_pass import DeviceBatch, WrittenPass, activation_widths, describe, make_pairs

logger = logging.getLogger("jaxsloth.torch_backend")

GRAPHS_KEPT = 8
# The bfloat16 copies of NF4 weights are kept where they take at most this part of the device's memory.
KEPT_WEIGHTS = 1 / 16
# Of the free host memory, what offloaded activations may take; torch rounds pinned memory up to powers of two.
HOST_PART = 0.4
AUTO_ORDER = ("none", "selective", "offload", "full")

Arrays = dict[str, np.ndarray]


def make_program(decoder: Decoder, spec: ModelSpec, options: BuildOptions) -> WrittenProgram | None:
    """The written pass, or None where autograd has to do it; see `runs_written`."""
    if not runs_written(decoder, spec, options):
        return None
    return WrittenProgram(decoder, spec, options.gradient_checkpointing, options.compute)


def runs_written(decoder: Decoder, spec: ModelSpec, options: BuildOptions) -> bool:
    """True where the written pass trains what `spec` says; implementations={"train_pass": …} asks for one by name.

    Raises:
        RefusedError: "written", or compute fp8, was asked for and can't train this model, or another name came.
    """
    reason = None if trainable_shapes(spec) else "has nothing to train"
    if options.compute == "fp8":
        reason = reason or fp8.layer_refusal(decoder.linears())
        if reason is not None:
            raise RefusedError(f"compute fp8 can't train this model: it {reason}; set compute: exact")
    requested = (options.implementations or {}).get("train_pass")
    return choose_written("train_pass", "torch", requested, reason, decoder.device.type)


class WrittenProgram:
    """`WrittenPass` for batches from the host, replayed from CUDA graphs where that pays."""

    def __init__(self, decoder: Decoder, spec: ModelSpec, checkpointing: CheckpointingName, compute: ComputeName) -> None:
        self._decoder, self._spec, self._device = decoder, spec, decoder.device
        self._checkpointing, self._compute = checkpointing, compute
        self._pass: WrittenPass | None = None
        self._tokens = 0  # the most that `mode` was chosen for
        self._inputs_only = False
        self._graphs: OrderedDict[Any, tuple[torch.cuda.CUDAGraph, Tensors, torch.Tensor]] = OrderedDict()
        self._seen: set[Any] = set()
        self._refused: set[Any] = set()
        self._memory: Any = None
        scalings = (layer.attention.rope.scaling for layer in spec.layers if layer.attention.rope is not None)
        # A rotary setting that looks at the longest position would be frozen into a graph.
        self._stretches = any(scaling is not None and scaling.kind in ("dynamic", "longrope") for scaling in scalings)
        self.mode = ""

    def begin(self, tokens: int) -> None:
        """Takes over the adapters' values. tokens: the most that a micro-batch of this process has, 0 where no gradients are
        asked for; for more than ever before what is kept is chosen anew, and graphs of fewer stay as they were recorded."""
        longer = tokens > self._tokens
        if longer:
            self._tokens = tokens
            self._choose(tokens)  # before the pass is made, whose copies of weights are counted apart
        if self._pass is None:
            self._pass = WrittenPass(self._decoder, self._keeps_weights, self._compute)
            for kind in describe(self._decoder):
                logger.info("training pass, %s", kind)
        if longer:
            self._pass.keep(self.mode, self.mode == "offload" and self._inputs_only)
        self._pass.begin()

    def row_losses(self, batch: Batch, smoothing: float = 0.0, inputs: Tensors | None = None) -> torch.Tensor:
        """The cross entropy summed by row, float32 ``[rows]``."""
        assert self._pass is not None
        return self._pass.row_losses(self._sent(batch, inputs or {}), smoothing)

    def hidden(self, batch: Batch, learns: bool, inputs: Tensors) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
        """As `WrittenPass.hidden`, and its backward, which takes the output's gradient."""
        assert self._pass is not None
        sent, written_pass = self._sent(batch, inputs), self._pass
        hidden, forward = written_pass.hidden(sent, learns)

        def backward(dhidden: torch.Tensor) -> None:
            nonlocal forward
            if forward is None:
                raise RuntimeError("a written pass keeps what one backward needs; call the model again for another backward")
            once, forward = forward, None
            written_pass.backward(sent, once, dhidden)

        return hidden, backward

    def add_gradients(self, batch: Batch, objective: Objective, inputs: Tensors) -> torch.Tensor:
        """As `WrittenPass.add_gradients`; what it returns is only good until the next call. Among the inputs may be
        "noise", see `DeviceBatch`, and "rng_key", int64 ``[2]``."""
        assert self._pass is not None
        arrays, key = prepare(batch)
        if "rng_key" in inputs:
            arrays["rows"] = batch.rows
        key = (*key, tuple(inputs), objective)
        tensors = to_tensors(arrays, self._device) | inputs
        longest = int(batch.positions.max(initial=0)) + 1
        if not self._captures or key in self._refused:
            return self._run(tensors, key, longest)
        if key not in self._graphs and key not in self._seen:
            # The first time compiles kernels and makes the libraries' handles, which a capture must not.
            self._seen.add(key)
            return self._run(tensors, key, longest)
        if key not in self._graphs and not self._capture(tensors, key, longest):
            return self._run(tensors, key, longest)
        graph, static, result = self._graphs[key]
        self._graphs.move_to_end(key)
        for name, tensor in tensors.items():
            static[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return result

    @property
    def captured(self) -> int:
        """The count of graphs that are held."""
        return len(self._graphs)

    @property
    def _captures(self) -> bool:
        return self._device.type == "cuda" and not self._stretches

    def _run(self, tensors: Tensors, key: Any, longest: int) -> torch.Tensor:
        assert self._pass is not None
        return self._pass.add_gradients(self._on_device(tensors, key, longest), key[-1], tensors)

    def _capture(self, tensors: Tensors, key: Any, longest: int) -> bool:
        """Records the pass for batches like this one; False where the graph's own memory does not fit beside the rest."""
        static = {name: tensor.clone() for name, tensor in tensors.items()}
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        try:
            # thread_local: a data loader's thread may pin memory meanwhile, which would end a capture that watches all threads.
            recording = torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local")
            with torch.cuda.device(self._device), recording:
                result = self._run(static, key, longest)
        except torch.OutOfMemoryError:
            logger.warning(
                "no CUDA graph for batches of %s: its memory does not fit; steps launch their kernels one by one", key[:2]
            )
            self._refused.add(key)
            return False
        self._graphs[key] = graph, static, result
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        return True

    def _sent(self, batch: Batch, inputs: Tensors) -> DeviceBatch:
        arrays, key = prepare(batch)
        if "rng_key" in inputs:
            arrays["rows"] = batch.rows
        return self._on_device(to_tensors(arrays, self._device) | inputs, key, int(batch.positions.max(initial=0)) + 1)

    def _on_device(self, tensors: Tensors, key: Any, longest: int) -> DeviceBatch:
        batch, length, document, *_ = key
        layout = Layout(batch, length, tensors["segments"], tensors.get("boundaries"), document)
        rng_key = tensors.get("rng_key")
        return DeviceBatch(
            tensors["input_ids"],
            layout,
            self._decoder.rope_tables(tensors["positions"], longest),
            tensors["target_positions"],
            tensors["targets"],
            tensors.get("noise"),
            None if rng_key is None else DropoutKey(rng_key, tensors["rows"]),
        )

    @property
    def _size(self) -> int:
        """Bytes of a value in the compute dtype."""
        return torch.empty(0, dtype=self._decoder.dtype).element_size()

    @property
    def _keeps_weights(self) -> bool:
        """True where quantized weights are kept as products take them."""
        if self._device.type != "cuda":
            return False
        values = sum(linear.shape[0] * linear.shape[1] for linear in self._decoder.linears())
        return values * self._size <= torch.cuda.get_device_properties(self._device).total_memory * KEPT_WEIGHTS

    def _choose(self, tokens: int) -> None:
        """Sets what a pass over so many tokens keeps, and where."""
        mode: str = self._checkpointing
        if mode == "auto":
            free = free_memory(self._device) - (self._copies() if self._pass is None else 0)
            mode = first_fitting({one: tokens * self._size * self._widths(one)[0] for one in AUTO_ORDER}, free)
            if mode != self.mode:
                logger.info("gradient_checkpointing auto chose %s for %d tokens", mode, tokens)
        self.mode = mode
        if mode != "offload" or self._inputs_only:
            return
        need, free = tokens * self._size * self._widths(mode)[1], host_memory()
        self._inputs_only = need > free * HOST_PART
        if self._inputs_only:
            logger.warning(
                "gradient_checkpointing offload would pin %.0f GiB of host memory, and %.0f GiB are free: only the layers' "
                "inputs go there, the rest is formed again",
                need / 2**30,
                free / 2**30,
            )

    def _widths(self, mode: str) -> tuple[int, int]:
        return activation_widths(self._decoder, self._spec.lora, make_pairs(self._decoder), mode)

    def _copies(self) -> int:
        """Bytes of weights' copies: of quantized ones in the compute dtype, where they are kept, of dense ones in 8 bits."""
        linears = list(self._decoder.linears())
        values = sum(one.shape[0] * one.shape[1] for one in linears)
        quantized = sum(one.shape[0] * one.shape[1] for one in linears if one.base.quantized)
        copies = quantized * self._size if self._keeps_weights else 0
        return copies + (2 * (values - quantized) if self._compute == "fp8" else 0)


def prepare(batch: Batch) -> tuple[Arrays, tuple[Any, ...]]:
    """(the batch's arrays, what makes two batches the same program): counts are rounded up so that few programs occur."""
    rows, length = batch.input_ids.shape
    tokens = rows * length
    target_positions = np.flatnonzero(batch.targets != IGNORE)
    unit = max(tokens // 16, 16)
    count = min(-(-max(len(target_positions), 1) // unit) * unit, tokens)
    targets = np.full(count, IGNORE, np.int64)
    targets[: len(target_positions)] = batch.targets.reshape(-1)[target_positions]
    padded = np.full(count, tokens, np.int64)
    padded[: len(target_positions)] = target_positions
    arrays = {
        "input_ids": batch.input_ids,
        "positions": batch.positions,
        "segments": batch.segments,
        "target_positions": padded,
        "targets": targets,
    }
    boundaries, longest = boundaries_of(batch.segments), 0
    if boundaries is not None:
        arrays["boundaries"] = boundaries
        longest = min(1 << int(np.diff(boundaries).max() - 1).bit_length(), length)
    return arrays, (rows, length, longest, count, None if boundaries is None else len(boundaries))


def to_tensors(arrays: Arrays, device: torch.device) -> Tensors:
    return {name: to_device(array, device) for name, array in arrays.items()}

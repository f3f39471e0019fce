"""The Backend protocol: all that the loop, the front end and the parity suite see of a backend; and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np

from jaxsloth.batch import Batch, StepBatch
from jaxsloth.extras import MissingExtraError, require
from jaxsloth.functional_model import FunctionalModel
from jaxsloth.models.spec import ModelSpec
from jaxsloth.objectives.objective import Objective
from jaxsloth.options import BACKENDS, BackendName, CheckpointingName, ComputeName, DtypeName
from jaxsloth.sampling import Sampling


@dataclass(frozen=True)
class DeviceInfo:
    """The devices that this process group trains on. memory_bytes is of one device, None where unknown (CPU)."""

    platform: Literal["cpu", "cuda", "tpu"]
    name: str
    count: int  # data-parallel devices over all processes
    rank: int = 0  # of this process
    processes: int = 1
    memory_bytes: int | None = None


@dataclass(frozen=True)
class BuildOptions:
    """How a model is built. dtype is the compute dtype and that of dense frozen weights.

    compute: "fp8" forms the layers' products with frozen weights in 8 bits, in training and in `EvalStep`; logits and
    generation stay exact.
    """

    dtype: DtypeName = "float32"
    gradient_checkpointing: CheckpointingName = "none"
    implementations: Mapping[str, str] | None = None  # op name -> implementation asked for by name
    compute: ComputeName = "exact"


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): decoupled decay, bias-corrected, eps outside the root.

    name: "adamw_8bit" keeps the moments of tensors of 4096 values and more in 8 bits, as bitsandbytes' AdamW8bit does.
    max_grad_norm: global-norm clipping by ``max_norm / (norm + 1e-6)`` where the norm is larger; None turns it off.
    loss_scaling: fp16 dynamic loss scaling (start 65536, halved on a non-finite gradient, doubled after 2000 good steps).
    embedding_rate: what the learning rate is multiplied by for the embedding and the head where they are trained whole.
    """

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    loss_scaling: bool = False
    embedding_rate: float = 1.0


class TensorSource(Protocol):
    """A checkpoint's tensors under Hugging Face names, read one at a time.

    `read` returns a numpy array (bfloat16 as ml_dtypes.bfloat16), or an NF4 of numpy arrays where the checkpoint is already
    quantized.
    """

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Any: ...


@dataclass(frozen=True)
class StepResult:
    """What a step returns: scalars on the device (or floats), read only when logged.

    loss is the objective's, over all devices. skipped is nonzero where fp16 overflowed and nothing was updated. scalars: the
    three in one array ``[3]``, where a backend has it: one transfer to the host, not three, whose `tolist` and
    `block_until_ready` wait for this step and for none that was dispatched since. log_probs: of a `RowObjective`,
    ``[accumulation, batch]`` float32 on the device: the log-probs summed over each row's targets, before the update; 0 for rows
    without any.
    """

    loss: Any
    grad_norm: Any
    skipped: Any
    scalars: Any = None
    log_probs: Any = None

    def wait(self) -> None:
        """Waits for the device; in a thread too."""
        if self.scalars is None:
            self.floats()
        else:
            self.scalars.block_until_ready()

    def floats(self) -> tuple[float, float, bool]:
        """Waits for the device: (loss, grad_norm, skipped)."""
        values = (self.loss, self.grad_norm, self.skipped) if self.scalars is None else self.scalars.tolist()
        loss, grad_norm, skipped = (float(value) for value in values)
        return loss, grad_norm, bool(skipped)

    def host_log_probs(self) -> np.ndarray:
        """Waits for the device: float32 ``[accumulation, batch]``."""
        return np.array(self.log_probs.tolist(), np.float32)


class Step(Protocol):
    """One optimizer step over a whole accumulation step batch, on all devices, of one objective."""

    def __call__(self, step_batch: StepBatch, *, learning_rate: float, step: int, seed: int) -> StepResult:
        """Updates the trained weights. step counts optimizer steps from 0; (seed, step) key the dropout masks and the noise.

        Raises:
            ValueError: the step batch is not what the objective is defined on (`Objective.prepare`).
        """
        ...

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state: ``{peft_name}.exp_avg`` and ``.exp_avg_sq`` float32, ``count`` int64 (updates applied), and
        with loss scaling ``loss_scale`` float32 and ``good_steps`` int64. In 8 bits the moments are uint8 codes, and
        ``.exp_avg_absmax`` and ``.exp_avg_sq_absmax`` float32 ``[blocks]``. The same keys on every backend."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None: ...

    def freeze(self, names: Collection[str]) -> None:
        """From now on exactly these trained tensors (PEFT names) stay as they are: their gradients count as 0, also in the norm
        that is clipped, and they don't decay."""
        ...


class EvalStep(Protocol):
    def __call__(self, batch: Batch) -> tuple[Any, int]:
        """(summed loss as a device scalar, count of valid tokens) over all devices; dropout is off."""
        ...


class DecodeState(Protocol):
    """A batch being decoded with a KV cache."""

    def logits(self) -> np.ndarray:
        """Those that follow the last token that was appended, float32 [batch, vocab]."""
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Appends one token a row (int32 [batch]) and returns the next logits, float32 [batch, vocab]."""
        ...

    def choose(self, sampling: Sampling, count: int) -> Iterator[np.ndarray]:
        """Chooses a token a row from the logits, appends it, and so on: yields `count` tokens a row, int32 [batch, n], n at a
        time; the last of them is left to be appended by `step`. Rows do not end; the caller stops asking. In the place of a
        token `sampling.NO_CHOICE` says that the logits were NaN, or all of them -inf.

        Raises:
            ValueError: `count` - 1 more tokens do not fit into the cache; the sampling does not fit the model or the batch.
        """
        ...

    def reorder(self, rows: np.ndarray) -> None:
        """Row i goes on from what row rows[i] was (int [batch]), as a search over several answers asks."""
        ...


class Model(Protocol):
    """A built model of one backend. Arrays cross as numpy, by Hugging Face or PEFT name."""

    spec: ModelSpec
    options: BuildOptions

    def add_adapters(self, spec: ModelSpec, values: Mapping[str, np.ndarray]) -> None:
        """Adds what spec.lora names, with `values` for every name of `trainable_shapes(spec)` (float32)."""
        ...

    def trainable(self) -> dict[str, np.ndarray]:
        """Every trained tensor by PEFT name, float32; the keys of `trainable_shapes(spec)`."""
        ...

    def trained_arrays(self) -> dict[str, tuple[Any, int | None]]:
        """`trainable` where it lies on the first device: (an array that has DLPack, the place in its first axis or None). It is
        the memory itself, for who reads it before the next step and lets go of it."""
        ...

    def load_trainable(self, values: Mapping[str, np.ndarray]) -> None: ...

    def base_tensor(self, name: str) -> np.ndarray:
        """A base weight by Hugging Face name, dequantized where it is NF4, float32."""
        ...

    def quantized_tensor(self, name: str) -> Any:
        """The NF4 (numpy arrays) of a quantized weight, by Hugging Face name."""
        ...

    def logits(self, batch: Batch) -> np.ndarray:
        """float32 [batch, length, vocab]; adapters active. For tests and small inputs: the whole thing is made."""
        ...

    def gradients(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """(mean loss over valid tokens, its gradient by PEFT name). For tests."""
        ...

    def set_gradient_checkpointing(self, name: CheckpointingName) -> None:
        """Takes effect for the train steps and gradients that are asked for from now on."""
        ...

    def step(self, objective: Objective, optimizer: OptimizerOptions) -> Step: ...

    def eval_step(self, label_smoothing: float = 0.0) -> EvalStep: ...

    def row_log_probs(self, adapters: bool = True) -> Callable[[Batch], np.ndarray]:
        """A function from a batch (all devices' rows) to float32 ``[rows]``: the sum over a row's targets of log p(target).
        Dropout is off. adapters=False: the base model's, the reference of training an adapter.

        Raises:
            ValueError: adapters=False, and modules or biases are trained whole, so that the base is not what it was.
        """
        ...

    def functional(self) -> FunctionalModel:
        """This model's passes for a torch module; of its own adapters they know nothing."""
        ...

    def start_decode(self, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> DecodeState:
        """Prefill. input_ids int32 [batch, length] padded on the LEFT, lengths int32 [batch] (real tokens a row), capacity
        slots in all. Padding that is `sampling.NOTHING` is seen by no processor of sequences."""
        ...


class Backend(Protocol):
    """A backend module's object: `jaxsloth.torch_backend.BACKEND`, `jaxsloth.jax_backend.BACKEND`."""

    name: BackendName

    def devices(self) -> DeviceInfo: ...

    def use_device(self, index: int) -> None:
        """Models built from now on run on this one of the visible devices, alone.

        Raises:
            ValueError: there is no such device, torchrun gives this process another, or a model was built for another.
        """
        ...

    def build(self, spec: ModelSpec, source: TensorSource, options: BuildOptions) -> Model:
        """Builds the model of `spec`, reading each tensor of `source` once and quantizing it as it arrives.

        Raises:
            ValueError: a tensor is missing, has another shape than the spec says, or holds a value that is not finite; the
                message names the tensor.
        """
        ...

    def training_passes(self, spec: ModelSpec, options: BuildOptions) -> list[str]:
        """How the written training pass would train each kind of block of a model with adapters, which is not built: "4 blocks:
        self_attn: written; mlp: local vjp (a reason)", as a run's log says it.

        Raises:
            ValueError: this backend can't build the model.
            RefusedError: it can't train it with these options.
        """
        ...

    def synchronize(self) -> None:
        """Waits until the devices are idle."""
        ...

    def peak_memory(self) -> int | None:
        """Peak bytes in use on one device since the process began (host: peak resident set)."""
        ...

    def barrier(self) -> None:
        """Waits until every process has come here."""
        ...


class BackendUnavailableError(MissingExtraError):
    """A backend was asked for whose packages are not installed."""


def load_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailableError: its packages are not installed; the message names the extra that brings them.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {name!r}")
    require(name, f"backend {name!r}", BackendUnavailableError)
    return import_module(f"jaxsloth.{name}_backend").BACKEND

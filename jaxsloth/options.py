"""Names of options that the backend protocol, the functional model and the backends share."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["torch", "jax"]
DtypeName = Literal["float32", "bfloat16", "float16"]
CheckpointingName = Literal["none", "selective", "full", "offload", "auto"]
ComputeName = Literal["exact", "fp8"]
BACKENDS: tuple[BackendName, ...] = ("torch", "jax")

"""The state of a built model that its steps, passes and decoding share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from jaxsloth.backend import BuildOptions
from jaxsloth.models.names import EMBEDDING, LM_HEAD
from jaxsloth.models.spec import ModelSpec
from jaxsloth.torch_backend.decode_pass import DecodeProgram
from jaxsloth.torch_backend.decoder import Decoder
from jaxsloth.torch_backend.optimizer import Flat
from jaxsloth.torch_backend.written_program import WrittenProgram, make_program


class ModelState:
    """`decoder` is the nn.Module; idle_program: the last request's decoding program, for the next one."""

    def __init__(self, spec: ModelSpec, options: BuildOptions, decoder: Decoder) -> None:
        self.spec, self.options, self.decoder = spec, options, decoder
        self.idle_program: DecodeProgram | None = None
        self._base: dict[str, torch.nn.Parameter] = {}  # what `keep_base` holds
        self._flat: Flat | None = None
        self._program: WrittenProgram | None = None

    def written_program(self) -> WrittenProgram | None:
        """The written training pass, one for training and evaluation; None where autograd is used."""
        if self._program is None:
            self._program = make_program(self.decoder, self.spec, self.options)
        return self._program

    def flat(self) -> Flat:
        if self._flat is None:
            raise ValueError("the model has no adapters to train; call add_adapters first")
        return self._flat

    def keep_base(self) -> Mapping[str, torch.nn.Parameter]:
        """The base's embedding, head and biases by tensor name, held from the first call on, whatever is then trained in their
        place. Without one the decoder alone holds them, and lets go of what is trained whole."""
        if not self._base:
            names = [name for name in (EMBEDDING, LM_HEAD) if name == EMBEDDING or not self.spec.head.tied]
            self._base = {f"{name}.weight": self.decoder.get_submodule(name).weight for name in names}  # type: ignore[misc]
            biased = {f"{linear.name}.bias": linear.bias for linear in self.decoder.linears()}
            self._base |= {name: bias for name, bias in biased.items() if bias is not None}
        return self._base

"""jaxsloth's backends behind the torch module, with PEFT's adapters and torch's AdamW: what a Hugging Face trainer drives."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, get_peft_model

from benchmarks.peers.own import build_options
from benchmarks.peers.torch_loop import PeftRunner, limit_memory
from benchmarks.shapes import shape_config
from benchmarks.work import Work, specs
from jaxsloth.backend import Backend, BackendName, load_backend
from jaxsloth.convert.checkpoint import open_checkpoint
from jaxsloth.frontend.module.causal_lm import JaxslothForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ModuleRunner(PeftRunner):
    """The loop around PEFT models, and the backend's own memory."""

    def __init__(self, backend: BackendName, folder: Path, work: Work) -> None:
        self._engine: Backend = load_backend(backend)
        model = self._engine.build(specs(work)[0], open_checkpoint(folder).source, build_options(work))
        module = JaxslothForCausalLM.over(model, shape_config(work.shape), str(folder))
        if work.lora:
            config = LoraConfig(
                r=work.r, lora_alpha=work.alpha, target_modules=PROJECTIONS, lora_dropout=0.0, task_type="CAUSAL_LM"
            )
            wrapped = get_peft_model(module, config)
            module.model.gradient_checkpointing = work.checkpointing != "none"
            super().__init__(wrapped.train(), work)
        else:
            super().__init__(module, work)
        self._engine.synchronize()

    def peak_memory(self) -> int | None:
        return self._engine.peak_memory()


def build_torch(folder: Path, work: Work) -> ModuleRunner:
    limit_memory(work)
    return ModuleRunner("torch", folder, work)


def build_jax(folder: Path, work: Work) -> ModuleRunner:
    return ModuleRunner("jax", folder, work)

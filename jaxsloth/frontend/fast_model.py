"""FastLanguageModel and FastModel: loading and adapting, with the arguments that Unsloth's scripts give."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxsloth.convert.peft_adapter import base_model_of, find_adapter
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.frontend.argument_values import AdaptValues, LoadValues, check_values
from jaxsloth.frontend.arguments import refuse_unknown, refuse_where_set, warn_once, warn_renamed, warn_where_set
from jaxsloth.frontend.backends import resolve_backend
from jaxsloth.frontend.loading import checkpointing_name, load
from jaxsloth.frontend.quantization import Asked, read_bitsandbytes
from jaxsloth.transforms import ALL_LINEAR, SAVEABLE, match_modules, saved_modules

_LOAD_REFUSED: dict[str, tuple[Any, str]] = {
    "load_in_8bit": (False, "bases are stored in 16 or 32 bits or as NF4; use load_in_4bit=True"),
    "load_in_fp8": (False, "bases are stored in 16 or 32 bits or as NF4; use load_in_4bit=True"),
    "full_finetuning": (False, "the base is frozen on both backends; train adapters (get_peft_model)"),
    "auto_model": (None, "other heads than a language model's come with encoders and classification, which are not here yet"),
    "resize_model_vocab": (None, "the vocabulary of a model can't be resized; choose tokens that it has"),
    "fast_inference": (False, "there is no vLLM in here; leave it out, generate() decodes with a KV cache"),
    "qat_scheme": (None, "quantization-aware training is not supported"),
    "float8_kv_cache": (False, "the KV cache is in the compute dtype"),
    "whisper_language": (None, "speech models are not supported"),
    "whisper_task": (None, "speech models are not supported"),
    "config": (None, "a checkpoint's own config.json counts; change rope_scaling by its argument"),
    "state_dict": (None, "weights are read from the checkpoint; save them, and name that folder"),
    "subfolder": ("", "name the folder itself: download the repository and give its path"),
    "variant": (None, "only a checkpoint's plain file names are read"),
    "gguf_file": (None, "give the .gguf file's path as model_name"),
    "from_tf": (False, "only safetensors and GGUF are read"),
    "from_flax": (False, "only safetensors and GGUF are read"),
    "use_safetensors": (True, "only safetensors and GGUF are read"),
    "ignore_mismatched_sizes": (False, "a tensor of another shape than config.json's is an error"),
    "output_loading_info": (False, "a checkpoint is read as a whole, or refused by name"),
    "key_mapping": (None, "tensors have their architecture's names"),
    "tp_plan": (None, "a base is whole on each device"),
    "max_memory": (None, "a base is whole on each device; choose one by device_map"),
    "offload_folder": (None, "no layer is left on disk"),
}
_LOAD_UNUSED: dict[str, tuple[Any, str]] = {
    "trust_remote_code": (False, "code of a repository is never run"),
    "offload_embedding": (False, "the embedding stays on the device"),
    "float32_mixed_precision": (None, "norms, softmax and loss are in float32 always"),
    "gpu_memory_utilization": (0.5, "it is vLLM's, and nothing is reserved here"),
    "max_lora_rank": (64, "it is vLLM's; any rank can be generated with"),
    "disable_log_stats": (True, "it is vLLM's"),
    "unsloth_force_compile": (False, "each backend compiles what it compiles"),
    "fullgraph": (True, "each backend compiles what it compiles"),
    "return_logits": (False, "logits are made whenever they are read"),
    "attn_implementation": (None, "attention is chosen by backend and device; see jaxsloth info"),
    "use_flash_attention_2": (False, "attention is chosen by backend and device; see jaxsloth info"),
    "low_cpu_mem_usage": (True, "weights are read one tensor at a time in any case"),
    "offload_state_dict": (False, "weights are read one tensor at a time in any case"),
    "use_cache": (True, "generate() caches keys, training does not"),
    "use_fast": (True, "tokenizers are the fast ones where there are"),
    "force_download": (False, "the hub's cache counts"),
    "resume_download": (None, "downloads are resumed in any case"),
    "proxies": (None, "set HTTPS_PROXY"),
    "mirror": (None, "set HF_ENDPOINT"),
    "pretraining_tp": (1, "nothing is split"),
    **{
        f"bnb_4bit_{name}": (value, "give quantization_config=BitsAndBytesConfig(…), or leave it out: NF4, nested")
        for name, value in (("compute_dtype", None), ("quant_type", "nf4"), ("use_double_quant", True))
    },
}
# What transformers once called an argument -> its name here.
DEFAULT_LENGTH = 2048  # Unsloth's
_LOAD_RENAMED = {"torch_dtype": "dtype", "use_auth_token": "token"}
_BY_PEFT = "write peft.get_peft_model(model, peft.LoraConfig(…)), which takes it"
# Keywords of peft.LoraConfig for other adapters than LoRA, with what turns them off.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("use_qalora", "lora_bias", "use_bdlora"), False),
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config", "arrow_config"), None
    ),
    **dict.fromkeys(("kasa_config", "alora_invocation_tokens", "megatron_config"), None),
}
_ADAPT_REFUSED: dict[str, tuple[Any, str]] = {
    "layer_replication": (None, "no backend repeats layers"),
    "use_dora": (False, "no backend has DoRA; use plain LoRA"),
    "loftq_config": ({}, "LoftQ rewrites the base, which stays as it is; use init_lora_weights=True or 'gaussian'"),
    "target_parameters": (None, "adapters go on linear layers; name them in target_modules"),
    "qat_scheme": (None, "quantization-aware training is not supported"),
    "ensure_weight_tying": (False, "the head and the embedding are trained where they are two weights"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "exclude_modules"), (None, _BY_PEFT)),
    "trainable_token_indices": (None, "single rows are not trained; modules_to_save=['embed_tokens'] trains all of them"),
    "fan_in_fan_out": (False, "linear layers are stored as [out, in]"),
    **{name: (off, "it belongs to a kind of adapter that is not here; use plain LoRA") for name, off in _KINDS.items()},
}
_ADAPT_UNUSED: dict[str, tuple[Any, str]] = {
    "temporary_location": ("_unsloth_temporary_saved_buffers", "nothing is put aside on disk"),
    "max_seq_length": (DEFAULT_LENGTH, "from_pretrained's counts"),
    "finetune_vision_layers": (True, "the model has none"),
    "task_type": ("CAUSAL_LM", "the model is a causal language model"),
    "inference_mode": (False, "a new adapter is trained; load a saved one to answer only"),
}
_WHOLE = tuple(name.rpartition(".")[2] for name in SAVEABLE)
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), ("gate_proj", "up_proj", "down_proj", "gate_up_proj")


class FastLanguageModel:
    """The calls that every script begins with. Models are `torch.nn.Module`s on both backends; with adapters, PEFT's models."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int | None = DEFAULT_LENGTH,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: Any = "sequential",
        rope_scaling: Mapping[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        random_state: int = 3407,
        auto_model: Any = None,
        local_files_only: bool = False,
        cache_dir: str | None = None,
        backend: str | None = None,
        quantization_config: Any = None,
        **others: Any,
    ) -> tuple[Any, Any]:
        """Loads a model and its tokenizer.

        Args:
            model_name: a folder of safetensors, a .gguf file, ``package:NAME/file``, a Hugging Face name, or a PEFT adapter
                (its folder or Hugging Face name), whose base is then loaded with it, ready to be trained further.
            max_seq_length: what trainers cut rows at where they are given no length.
            dtype: None (bfloat16 on a GPU, float32 on a CPU), torch.float16, torch.bfloat16, torch.float32, or a name.
            load_in_4bit: store the linear layers as nested NF4. load_in_16bit=True turns it off.
            quantization_config: in place of load_in_4bit, transformers' BitsAndBytesConfig of NF4; see `read_bitsandbytes`.
            device_map: "auto" and its like, or one device ("cuda:1", {"": 1}), which all models of the process then share.
            rope_scaling: in place of the checkpoint's, in Hugging Face's form.
            use_gradient_checkpointing: True and "full" recompute blocks, "unsloth" and "offload" keep their inputs in host
                memory, "selective" keeps matrix products, "auto" takes the fastest that fits, False and "none" keep all.
            token, revision, cache_dir, local_files_only: for models of the Hugging Face hub.
            backend: "torch" or "jax"; see `jaxsloth.frontend.backends.resolve_backend`.

        fix_tokenizer, use_exact_model_name and random_state are taken as they are: tokenizers are not changed, names are never
        replaced by others, and loading draws nothing. Others are refused, or named in a warning, with the reason.

        Raises:
            TypeError: an argument that it does not have, with the nearest one that it has.
            ValueError: the checkpoint can't be read or is not supported, or an argument is refused.
        """
        values = {name: value for name, value in locals().items() if name in LoadValues.model_fields}
        check_values("from_pretrained", LoadValues, values)
        former = {today: _renamed(others, name, today) for name, today in _LOAD_RENAMED.items()}
        dtype, token = (former[name] if now is None else now for name, now in (("dtype", dtype), ("token", token)))
        asked = Asked(load_in_4bit and not load_in_16bit, True, dtype)
        if quantization_config is not None:
            asked = read_bitsandbytes(quantization_config, dtype)
        given = {**others, "load_in_8bit": load_in_8bit, "full_finetuning": full_finetuning, "auto_model": auto_model}
        given |= {"resize_model_vocab": resize_model_vocab, "trust_remote_code": trust_remote_code}
        _check(FastLanguageModel.from_pretrained, given, _LOAD_REFUSED, _LOAD_UNUSED)
        del fix_tokenizer, use_exact_model_name, random_state
        hub = {"token": token, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        hub = {name: value for name, value in hub.items() if value}
        adapter = find_adapter(model_name, **hub)
        if adapter is not None:
            hub.pop("revision", None)  # the adapter's
        loaded = load(
            model_name if adapter is None else base_model_of(adapter),
            backend=backend,
            dtype=asked.dtype,
            load_in_4bit=asked.load_in_4bit,
            nested=asked.nested,
            gradient_checkpointing=checkpointing_name(use_gradient_checkpointing),
            rope_scaling=rope_scaling,
            device_map=device_map,
            hub=hub,
        )
        return _as_module(loaded, max_seq_length, adapter)

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Sequence[str] = ALL_LINEAR,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Any = None,
        use_dora: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **others: Any,
    ) -> Any:
        """A `peft.PeftModel` over the model, its adapters drawn from random_state: the same on both backends.

        Args:
            target_modules: a list of names, "all-linear", or a regular expression, as PEFT matches them. "embed_tokens" and
                "lm_head" in the list are trained whole, as in Unsloth.
            modules_to_save: of "embed_tokens" and "lm_head", those to be trained whole, in float32.
            bias: "all" trains every bias of the linear layers too, "lora_only" those of the adapted ones, in float32. They are
                the base's own, as PEFT has it: they stay trained where the adapter is disabled.
            init_lora_weights: True (kaiming) or "gaussian"; B starts at zero.
            use_gradient_checkpointing: as in from_pretrained; takes the place of what was given there.
            finetune_attention_modules, finetune_mlp_modules: False leaves those layers out.

        Raises:
            TypeError: an argument that it does not have, with the nearest one that it has.
            ValueError: a target matches nothing, the model has adapters already, what is to be trained whole is tied, or an
                argument is refused.
        """
        values = {name: value for name, value in locals().items() if name in AdaptValues.model_fields}
        given = {**others, "use_dora": use_dora, "loftq_config": loftq_config or {}}
        _check(FastLanguageModel.get_peft_model, given, _ADAPT_REFUSED, _ADAPT_UNUSED)
        if hasattr(r, "peft_type"):
            raise TypeError(f"get_peft_model takes LoRA's settings by name here, got a {type(r).__name__}; {_BY_PEFT}")
        if not hasattr(model, "engine"):
            raise TypeError(f"get_peft_model takes a model of FastLanguageModel.from_pretrained, got a {type(model).__name__}")
        check_values("get_peft_model", AdaptValues, values)
        if hasattr(model, "peft_config"):
            raise ValueError("the model has adapters already; load the base again to begin anew")
        if init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"init_lora_weights must be True or 'gaussian', got {init_lora_weights!r}: others begin with a B that is "
                "not zero, or change the base"
            )
        checkpointing = checkpointing_name(use_gradient_checkpointing)
        spec = model.engine.model.spec
        if bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be one of none, all, lora_only, got {bias!r}")
        target_modules, whole = _split_targets(target_modules, modules_to_save)
        saved = saved_modules(spec, whole)
        left_out = (*(() if finetune_attention_modules else _ATTENTION), *(() if finetune_mlp_modules else _MLP))
        modules = [name for name in match_modules(spec, target_modules) if name.split(".")[-1] not in left_out]
        modules = _of_layers(modules, layers_to_transform, layers_pattern)
        if not modules or not finetune_language_layers:
            raise ValueError("no layer is left to adapt: the finetune_… arguments and layers_to_transform leave every one out")
        from jaxsloth.frontend.peft_models import set_checkpointing, wrap

        settings = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "bias": bias, "use_rslora": use_rslora}
        init = "gaussian" if init_lora_weights == "gaussian" else "kaiming"
        wrapped = wrap(model, modules, saved, init, random_state, **settings)
        set_checkpointing(wrapped, checkpointing)
        return wrapped

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode: dropout is off. The same model is returned; generate() needs nothing else."""
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode; checkpointing as it was, or as given."""
        if use_gradient_checkpointing is not None:
            from jaxsloth.frontend.peft_models import set_checkpointing

            set_checkpointing(model, checkpointing_name(use_gradient_checkpointing))
        return model.train()


class FastModel(FastLanguageModel):
    """Unsloth's name for any model; here, language models."""


def is_bfloat16_supported() -> bool:
    """Whether the backend's device computes in bfloat16: accelerators of the last years; False on a CPU, where models are
    float32 unless asked otherwise, so that scripts that set bf16 from it run everywhere."""
    engine = resolve_backend()
    platform = engine.devices().platform
    if platform == "cuda" and engine.name == "torch":
        import torch

        return torch.cuda.is_bf16_supported()
    return platform != "cpu"


def _renamed(others: dict[str, Any], former: str, today: str) -> Any:
    """What came under a former name, taken out, with a warning; None where nothing did."""
    value = others.pop(former, None)
    if value is not None:
        warn_renamed("from_pretrained", former, today)
    return value


def _check(function: Any, given: Mapping[str, Any], refused: Mapping[str, Any], unused: Mapping[str, Any]) -> None:
    name, own = function.__name__, set(inspect.signature(function).parameters) - {"others"}
    known = {*own, *refused, *unused}
    refuse_unknown(name, known, {key: value for key, value in given.items() if key not in known})
    refuse_where_set(name, given, refused)
    warn_where_set(name, given, unused)


def _as_module(loaded: Any, max_seq_length: int | None, adapter: Path | None) -> tuple[Any, Any]:
    from jaxsloth.frontend.language_model import FastModelForCausalLM
    from jaxsloth.frontend.peft_models import load_adapter, set_checkpointing

    longest = loaded.model.spec.max_positions
    if max_seq_length == DEFAULT_LENGTH:  # nobody asked for it
        max_seq_length = min(max_seq_length, longest)
    if max_seq_length is not None and max_seq_length > longest:
        warn_once(
            f"max_seq_length={max_seq_length} is more than the {longest} positions that the model was made for; longer rows "
            "need rope_scaling"
        )
    if adapter is not None and (adapter / "tokenizer_config.json").is_file():
        loaded = replace(loaded, tokenizer=load_tokenizer(adapter))
    model = FastModelForCausalLM.of(loaded, max_seq_length or longest)
    set_checkpointing(model, loaded.model.options.gradient_checkpointing)
    return (model if adapter is None else load_adapter(model, adapter)), loaded.tokenizer


def _split_targets(targets: str | Sequence[str], saved: Sequence[str] | None) -> tuple[str | Sequence[str], list[str]]:
    """(the linear layers among the targets, what is trained whole): Unsloth's scripts name the embedding and the head among the
    targets.

    Raises:
        ValueError: no linear layer is among them.
    """
    asked = [saved] if isinstance(saved, str) else list(saved or ())
    if isinstance(targets, str):
        return targets, asked
    whole = [target for target in targets if target.rpartition(".")[2] in _WHOLE]
    rest = [target for target in targets if target not in whole]
    if not rest:
        raise ValueError(
            f"target_modules must name linear layers, which get the adapters, got {list(targets)}; add some (q_proj, …), "
            'or take "all-linear"'
        )
    if whole:
        warn_once(f"target_modules: trained whole (modules_to_save), in float32, not by an adapter: {', '.join(whole)}")
    return rest, [*asked, *whole]


def _of_layers(modules: Sequence[str], layers: int | Sequence[int] | None, pattern: str | Sequence[str] | None) -> list[str]:
    """Those in the numbered blocks; pattern: what the list of blocks is called, "layers" in every model here."""
    if pattern is not None and list([pattern] if isinstance(pattern, str) else pattern) != ["layers"]:
        raise ValueError(f"layers_pattern must be 'layers', got {pattern!r}")
    if layers is None:
        return list(modules)
    chosen = {layers} if isinstance(layers, int) else set(layers)
    return [name for name in modules if int(name.split(".")[2]) in chosen]

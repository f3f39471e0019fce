"""FastLanguageModel: every keyword of Unsloth's signatures is used, refused with a reason, or named in a warning."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch

import jaxsloth
from jaxsloth import FastLanguageModel, FastModel, is_bfloat16_supported, memory_stats, set_backend
from jaxsloth.backend import DeviceInfo
from jaxsloth.chat_templates import CHAT_TEMPLATES, create_stopping_criteria
from jaxsloth.data.catalogue import TEMPLATES, template_source
from jaxsloth.frontend import arguments
from jaxsloth.frontend import fast_model as tables
from jaxsloth.frontend.backends import resolve_backend
from jaxsloth.frontend.loading import named_device
from tests.support.modules import BACKENDS
from tests.support.tiny import byte_tokenizer, write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
# Unsloth's public signatures (FastLanguageModel and FastModel), each with a value that asks for something.
LOAD_WORKS: dict[str, Any] = {
    "max_seq_length": 128,
    "dtype": torch.float16,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "load_in_16bit": True,
    "full_finetuning": False,
    "token": "hf_secret",
    "device_map": {"": "cpu"},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "fix_tokenizer": True,
    "use_gradient_checkpointing": True,
    "revision": "main",
    "use_exact_model_name": True,
    "random_state": 7,
    "local_files_only": True,
    "cache_dir": "/tmp/none",
    "auto_model": None,
    "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
LOAD_REFUSED: dict[str, Any] = {
    "load_in_8bit": True,
    "quantization_config": {"load_in_4bit": True},  # bitsandbytes takes fp4 then
    "load_in_fp8": True,
    "full_finetuning": True,
    "auto_model": object,
    "resize_model_vocab": 300,
    "fast_inference": True,
    "qat_scheme": "int4",
    "float8_kv_cache": True,
    "whisper_language": "en",
    "whisper_task": "transcribe",
    "config": {"vocab_size": 3},
    "state_dict": {"a": 1},
    "subfolder": "sub",
    "variant": "fp16",
    "gguf_file": "a.gguf",
    "from_tf": True,
    "from_flax": True,
    "use_safetensors": False,
    "ignore_mismatched_sizes": True,
    "output_loading_info": True,
    "key_mapping": {"a": "b"},
    "tp_plan": "auto",
    "max_memory": {0: "1GB"},
    "offload_folder": "away",
    "device_map": {"": "cuda:7"},
    "dtype": torch.int8,
    "rope_scaling": {"rope_type": "wavy", "factor": 2.0},
    "use_gradient_checkpointing": "sometimes",
    "backend": "tensorflow",
}
LOAD_WARNS: dict[str, Any] = {
    "trust_remote_code": True,
    "offload_embedding": True,
    "float32_mixed_precision": True,
    "gpu_memory_utilization": 0.9,
    "max_lora_rank": 8,
    "disable_log_stats": False,
    "unsloth_force_compile": True,
    "fullgraph": False,
    "return_logits": True,
    "attn_implementation": "eager",
    "use_flash_attention_2": True,
    "low_cpu_mem_usage": False,
    "offload_state_dict": True,
    "use_cache": False,
    "use_fast": False,
    "force_download": True,
    "resume_download": True,
    "proxies": {"https": "there"},
    "mirror": "there",
    "pretraining_tp": 2,
    "bnb_4bit_compute_dtype": torch.float16,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
}
ADAPT_WORKS: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj", "down_proj"],
    "lora_alpha": 32,
    "lora_dropout": 0.25,
    "bias": "none",
    "layers_to_transform": [1, 3],
    "layers_pattern": "layers",
    "use_gradient_checkpointing": False,
    "random_state": 5,
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "loftq_config": {},
    "use_dora": False,
    "finetune_language_layers": True,
    "finetune_attention_modules": False,
    "finetune_mlp_modules": True,
}
ADAPT_REFUSED: dict[str, Any] = {
    "layer_replication": [(0, 2)],
    "use_dora": True,
    "modules_to_save": ["norm"],
    "bias": "some",
    "loftq_config": peft.LoftQConfig(loftq_bits=4),
    "init_lora_weights": "pissa",
    "target_parameters": ["x"],
    "qat_scheme": "int4",
    "ensure_weight_tying": True,
    "target_modules": ["nothing_proj"],
    "layers_pattern": "blocks",
    "finetune_language_layers": False,
    "use_gradient_checkpointing": "sometimes",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "exclude_modules": ["q_proj"],
    "trainable_token_indices": [1],
    "fan_in_fan_out": True,
    **dict.fromkeys(tables._KINDS, "something"),
}
ADAPT_WARNS: dict[str, Any] = {
    "temporary_location": "here",
    "max_seq_length": 64,
    "finetune_vision_layers": False,
    "task_type": "SEQ_CLS",
    "inference_mode": True,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("fast") / "model"))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())
    monkeypatch.delenv("JAXSLOTH_BACKEND", raising=False)


def load(checkpoint, **settings):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, **({"load_in_4bit": False, "max_seq_length": 64} | settings))
    return model


@both
def test_what_loading_uses(checkpoint, backend):
    for name, value in LOAD_WORKS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load(checkpoint, backend=backend, **{name: value})
    model = load(checkpoint, backend=backend, **{k: v for k, v in LOAD_WORKS.items() if "4bit" not in k and "quant" not in k})
    engine = model.engine.model
    assert (model.max_seq_length, model.dtype, engine.options.dtype) == (128, torch.float16, "float16")
    assert engine.options.gradient_checkpointing == "full" and model.is_gradient_checkpointing
    assert engine.spec.quantization is None
    assert {layer.attention.rope.scaling.factor for layer in engine.spec.layers} == {2.0}
    four, _ = FastModel.from_pretrained(checkpoint, backend=backend, max_seq_length=64)
    assert four.engine.model.spec.quantization.nested


@both
@pytest.mark.parametrize("name", LOAD_REFUSED)
def test_what_loading_refuses(checkpoint, backend, name):
    with pytest.raises(ValueError, match=r"\w{4,}"):
        load(checkpoint, **({"backend": backend} | {name: LOAD_REFUSED[name]}))


@both
@pytest.mark.parametrize("name", LOAD_WARNS)
def test_what_loading_warns_of_once(checkpoint, backend, name):
    with pytest.warns(UserWarning, match=rf"{name}=.*\("):
        load(checkpoint, backend=backend, **{name: LOAD_WARNS[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(checkpoint, backend=backend, **{name: LOAD_WARNS[name]})


@both
def test_what_adapting_uses(checkpoint, backend):
    for name, value in ADAPT_WORKS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = FastLanguageModel.get_peft_model(load(checkpoint, backend=backend), **{name: value})
        assert isinstance(model, peft.PeftModel)
    settings = ADAPT_WORKS | {"finetune_attention_modules": True}
    model = FastLanguageModel.get_peft_model(load(checkpoint, backend=backend), **settings)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (2, 32, 0.25, True)
    kinds = ("mlp.down_proj", "self_attn.q_proj")
    assert sorted(config.target_modules) == [f"model.layers.{n}.{kind}" for n in (1, 3) for kind in kinds]
    assert model.get_base_model().engine.model.options.gradient_checkpointing == "none"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole = {name for name in trained if ".lora_" not in name}
    assert len(trained) == 9 and whole == {"base_model.model.lm_head.modules_to_save.default.weight"}


@both
@pytest.mark.parametrize("name", ADAPT_REFUSED)
def test_what_adapting_refuses(checkpoint, backend, name):
    with pytest.raises(ValueError, match=r"\w{4,}"):
        FastLanguageModel.get_peft_model(load(checkpoint, backend=backend), **{name: ADAPT_REFUSED[name]})


@pytest.mark.parametrize("name", ADAPT_WARNS)
def test_what_adapting_warns_of(checkpoint, name):
    with pytest.warns(UserWarning, match=rf"{name}=.*\("):
        FastLanguageModel.get_peft_model(load(checkpoint), **{name: ADAPT_WARNS[name]})


def test_every_argument_is_walked():
    """A new parameter of ours, or a row of a table, needs a case above."""
    loading = set(inspect.signature(FastLanguageModel.from_pretrained).parameters) - {"model_name", "others"}
    adapting = set(inspect.signature(FastLanguageModel.get_peft_model).parameters) - {"model", "others"}
    assert loading | set(tables._LOAD_REFUSED) | set(tables._LOAD_UNUSED) == {*LOAD_WORKS, *LOAD_REFUSED, *LOAD_WARNS}
    assert adapting | set(tables._ADAPT_REFUSED) | set(tables._ADAPT_UNUSED) == {*ADAPT_WORKS, *ADAPT_REFUSED, *ADAPT_WARNS}


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (True, "full"),
        ("unsloth", "offload"),
        (False, "none"),
        *((name, name) for name in ("none", "selective", "full", "offload", "auto")),
    ],
)
@both
def test_gradient_checkpointing_reaches_the_backend(checkpoint, backend, value, mode):
    model = FastLanguageModel.get_peft_model(load(checkpoint, backend=backend), use_gradient_checkpointing=value)
    assert model.get_base_model().engine.model.options.gradient_checkpointing == mode
    assert model.is_gradient_checkpointing == (mode not in ("none", "auto"))
    model = FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert model.training and model.get_base_model().engine.model.options.gradient_checkpointing == "none"
    assert not FastLanguageModel.for_inference(model).training


def test_unknown_arguments_name_the_nearest(checkpoint):
    with pytest.raises(TypeError, match="did you mean 'load_in_4bit'"):
        load(checkpoint, load_in_4bits=True)
    with pytest.raises(TypeError, match="did you mean 'lora_alpha'"):
        FastLanguageModel.get_peft_model(load(checkpoint), lora_alhpa=3)
    with pytest.raises(AttributeError, match="has no attribute 'FastLangageModel'"):
        _ = jaxsloth.FastLangageModel


WRONG_VALUES = {
    "max_seq_length": (-1, 3.7, "x", float("nan"), True, [1]),
    "load_in_4bit": ("False", -1, 3.7, []),
    "load_in_16bit": ("no",),
    "rope_scaling": (-1, "linear", [1]),
    "use_gradient_checkpointing": ([], {}, "some"),
    "revision": (5,),
    "token": ([],),
    "local_files_only": ("yes",),
}
WRONG_ADAPTERS = {
    "r": (None, 0, -4, 3.7, True, "16", float("nan"), 10**10, []),
    "lora_alpha": (None, 0, -16, "16", True, float("nan"), float("inf"), 10**7, [16]),
    "lora_dropout": (None, -0.1, 1.0, float("nan"), "0.1", True),
    "target_modules": (None, 5, [5], b"q_proj", {"q_proj": 1}),
    "layers_to_transform": (0.5, True, [True], ["0"], [1.0]),
    "layers_pattern": (3, [3]),
    "random_state": (None, 3.7, "x", float("nan")),
    "use_rslora": ("False", 2),
    "modules_to_save": (-1, [5]),
    "finetune_mlp_modules": ("False",),
    "use_gradient_checkpointing": ([],),
}


def test_what_arguments_may_be(checkpoint):
    """Never a TypeError from deep inside, never taken for something else ("False" is true to Python)."""
    for name, values in WRONG_VALUES.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{name} must be .*, got "):
                load(checkpoint, **{name: value})
    model = load(checkpoint)
    for name, values in WRONG_ADAPTERS.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"{name} must be .*, got "):
                FastLanguageModel.get_peft_model(model, **{name: value})
    with pytest.raises(TypeError, match="takes a model of FastLanguageModel"):
        FastLanguageModel.get_peft_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"get_peft_model: r must be .*\n.*get_peft_model: lora_alpha must be"):
        FastLanguageModel.get_peft_model(model, r=0, lora_alpha=0)
    given = {"r": np.int64(4), "target_modules": {"q_proj"}, "layers_to_transform": range(1), "lora_dropout": np.float32(0.5)}
    config = FastLanguageModel.get_peft_model(model, **given).peft_config["default"]
    assert (config.r, config.lora_dropout) == (4, 0.5) and config.target_modules == {"model.layers.0.self_attn.q_proj"}


def test_adapters_start_alike_on_both_backends(checkpoint):
    states = []
    for backend in BACKENDS:
        model = FastLanguageModel.get_peft_model(load(checkpoint, backend=backend), r=4, random_state=9)
        states.append({name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad})
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert np.array_equal(value, states[1][name])
        assert ("lora_B" in name) == (not value.any())


def test_precedence_of_backends(monkeypatch):
    assert resolve_backend().name == "jax"  # neither sees an accelerator here
    set_backend("torch")
    assert resolve_backend().name == "torch"
    monkeypatch.setenv("JAXSLOTH_BACKEND", "jax")
    assert resolve_backend().name == "jax"
    assert resolve_backend("torch").name == "torch"
    monkeypatch.setenv("JAXSLOTH_BACKEND", "tensorflow")
    with pytest.raises(ValueError, match="the environment variable JAXSLOTH_BACKEND is 'tensorflow'"):
        resolve_backend()
    set_backend(None)
    with pytest.raises(ValueError, match="set_backend is 'numpy'"):
        set_backend("numpy")


GPUS = DeviceInfo("cuda", "H200", 2)


@pytest.mark.parametrize(
    ("device_map", "index"),
    [
        *((name, None) for name in ("auto", "sequential", "balanced", None, "cuda", {"": "cuda"})),
        *((value, 1) for value in ("cuda:1", 1, {"": "cuda:1"}, {"": 1})),
        ({"": 0}, 0),
    ],
)
def test_devices_that_are_named(device_map, index):
    assert named_device(device_map, "jax", GPUS) == index


@pytest.mark.parametrize(
    ("device_map", "devices", "message"),
    [
        ({"": "cuda:0"}, DeviceInfo("cpu", "CPU", 1), "runs on cpu"),
        ({"model.layers.0": 0}, GPUS, "the whole model on one device"),
        ("somewhere", GPUS, "must be one of"),
    ],
)
def test_devices_of_another_kind(device_map, devices, message):
    with pytest.raises(ValueError, match=message):
        named_device(device_map, "jax", devices)


@both
def test_memory_and_the_like(checkpoint, backend):
    load(checkpoint, backend=backend)
    stats = memory_stats()
    assert (stats.backend, stats.device) == (backend, "CPU")
    assert 0 < stats.peak_bytes < stats.total_bytes and stats.peak_gib == round(stats.peak_bytes / 2**30, 3)
    assert is_bfloat16_supported() is False
    with pytest.warns(UserWarning, match="nothing needs patching"):
        jaxsloth.PatchDPOTrainer()
        jaxsloth.PatchFastRL("GRPO", FastLanguageModel)


def test_names_that_scripts_import():
    for name in ("FastVisionModel", "GRPOConfig", "KTOTrainer", "add_new_tokens"):
        with pytest.raises(ImportError, match=f"{name} is not here yet: .+"):
            getattr(jaxsloth, name)
    tokenizer = byte_tokenizer()
    for name, (template, stop) in CHAT_TEMPLATES.items():
        assert (template, stop) == (template_source(name), TEMPLATES[name].stop or "eos_token")
    assert CHAT_TEMPLATES["llama3"] == CHAT_TEMPLATES["llama-3"] and "fantasy" not in CHAT_TEMPLATES
    rows = tokenizer(["one end", "one eno"], return_tensors="pt", add_special_tokens=False).input_ids
    assert create_stopping_criteria(tokenizer, "end")(rows, None).tolist() == [True, False]
    rows[1, -1] = tokenizer.eos_token_id
    assert create_stopping_criteria(tokenizer)(rows, None).tolist() == [False, True]


def test_every_keyword_of_peft_is_walked():
    """Of LoraConfig; what none of ours can be is refused by the nearest name."""
    known = {*ADAPT_WORKS, *ADAPT_REFUSED, *ADAPT_WARNS}
    own = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config"}
    own |= {"megatron_core", "qalora_group_size"}
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known | own

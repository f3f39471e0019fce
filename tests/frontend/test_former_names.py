"""Scripts written for transformers 4 and TRL 0.x: every argument of those times is taken under today's name, refused with what
to write instead, or named in a warning."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig, GPTQConfig

from jaxsloth import DPOConfig, DPOTrainer, FastLanguageModel, SFTConfig, SFTTrainer
from jaxsloth.frontend import arguments, dpo_config, sft_config
from jaxsloth.frontend.quantization import _DEFAULTS
from tests.support.modules import BACKENDS
from tests.support.tiny import write_checkpoint

both = pytest.mark.parametrize("backend", BACKENDS)
# The fields that transformers 4.30 to 4.57 and TRL 0.8 to 0.24 had, and that those of today have not.
ARGUMENTS = {
    *("adafactor", "evaluation_strategy", "fp16_backend", "fp16_opt_level", "fsdp_min_num_params", "group_by_length"),
    *("fsdp_transformer_layer_cls_to_wrap", "half_precision_backend", "include_inputs_for_metrics", "jit_mode_eval"),
    *("include_tokens_per_second", "logging_dir", "mp_parameters", "no_cuda", "overwrite_output_dir", "past_index"),
    *("per_gpu_eval_batch_size", "per_gpu_train_batch_size", "push_to_hub_model_id", "push_to_hub_organization"),
    *("push_to_hub_token", "ray_scope", "save_safetensors", "sharded_ddp", "torchdynamo", "tpu_metrics_debug"),
    *("tpu_num_cores", "use_ipex", "use_legacy_prediction_loop", "use_mps_device", "warmup_ratio", "xpu_backend"),
}
SFT_ARGUMENTS = {
    *("chars_per_token", "dataset_batch_size", "dataset_kwargs", "eval_packing", "max_seq_length", "model_init_kwargs"),
    *("num_of_sequences", "use_liger"),
}
DPO_ARGUMENTS = {
    *("base_model_attribute_name", "force_use_ref_model", "generate_during_eval", "is_encoder_decoder", "label_pad_token_id"),
    *("max_completion_length", "max_prompt_length", "max_target_length", "model_adapter_name", "padding_value"),
    *("ref_adapter_name", "ref_model_init_kwargs", "reference_free", "rpo_alpha", "tools", "use_liger_loss"),
    "use_logits_to_keep",
}
SFT_TRAINER = {
    *("tokenizer", "max_seq_length", "dataset_text_field", "packing", "dataset_num_proc", "dataset_batch_size", "infinite"),
    *("neftune_noise_alpha", "model_init_kwargs", "dataset_kwargs", "eval_packing", "num_of_sequences", "chars_per_token"),
    *("optimizers", "model_init", "preprocess_logits_for_metrics", "optimizer_cls_and_kwargs", "compute_loss_func"),
}
DPO_TRAINER = {
    *("tokenizer", "beta", "label_smoothing", "loss_type", "label_pad_token_id", "padding_value", "truncation_mode"),
    *("max_length", "max_prompt_length", "max_target_length", "is_encoder_decoder", "disable_dropout", "model_init"),
    *("generate_during_eval", "precompute_ref_log_probs", "dataset_num_proc", "model_init_kwargs", "ref_model_init_kwargs"),
    *("model_adapter_name", "ref_adapter_name", "reference_free", "force_use_ref_model", "optimizers"),
}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("former") / "model"))


@pytest.mark.parametrize(
    ("config", "rules", "name"),
    [(SFTConfig, sft_config, name) for name in sorted(ARGUMENTS | SFT_ARGUMENTS)]
    + [(DPOConfig, dpo_config, name) for name in sorted(ARGUMENTS | DPO_ARGUMENTS)],
)
def test_a_former_field_is_mapped_refused_or_named(config, rules, name, tmp_path):
    """A value that asks for something is never taken without a word, but for those that are used as they are."""
    value: Any = {"evaluation_strategy": "no", "warmup_ratio": 0.5, "tools": [{"type": "function"}]}.get(name, 7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            made = config(str(tmp_path), **{name: value})
        except ValueError as error:
            assert f"{name}={value!r}: " in str(error) and name in rules.REFUSED
            return
    told = [str(warning.message) for warning in said if name in str(warning.message)]
    today = rules.RULES.renamed.get(name)
    if today is not None:
        assert getattr(made, today) == value
        assert f"{name} is called {today} now" in told[0]
    elif name not in rules.USED:
        assert f"{name}={value!r} (" in told[0]


@pytest.mark.parametrize(("trainer", "names"), [(SFTTrainer, SFT_TRAINER), (DPOTrainer, DPO_TRAINER)])
def test_what_trainers_once_took(trainer, names):
    known = {*trainer.deprecated_args, *trainer.refused, *trainer.unused, *trainer.__init__.__annotations__}
    assert names <= known
    with pytest.raises(TypeError, match=rf"no argument 'learning_rate'; write args={trainer.rules.name}\(learning_rate=…\)"):
        trainer(None, learning_rate=1e-3)


def four_bits(**fields):
    return BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4"} | fields)


@both
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_config_is_nf4(checkpoint, backend, nested):
    """As every QLoRA script of transformers has it; the codes are those of load_in_4bit."""
    config = four_bits(bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = FastLanguageModel.from_pretrained(checkpoint, 64, backend=backend, quantization_config=config)
    engine = model.engine.model
    assert engine.spec.quantization.nested is nested and engine.options.dtype == "bfloat16"
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, _ = FastLanguageModel.from_pretrained(checkpoint, backend=backend, load_in_4bit=True)
    stored = engine.quantized_tensor(name)
    assert np.array_equal(stored.codes, plain.engine.model.quantized_tensor(name).codes)
    assert (stored.nested is not None) is nested


@both
def test_bitsandbytes_config_says_whether(checkpoint, backend):
    """load_in_4bit is True by default here."""
    model, _ = FastLanguageModel.from_pretrained(checkpoint, backend=backend, quantization_config=BitsAndBytesConfig())
    assert model.engine.model.spec.quantization is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), "write bnb_4bit_quant_type='nf4'"),
        (BitsAndBytesConfig(load_in_8bit=True), "write load_in_4bit=True"),
        (four_bits(llm_int8_skip_modules=["q_proj"]), "llm_int8_skip_modules=.*or none"),
        (four_bits(llm_int8_enable_fp32_cpu_offload=True), "no layer is left on the host"),
        (four_bits(llm_int8_has_fp16_weight=True), "there are no 8-bit bases"),
        (four_bits(bnb_4bit_compute_dtype=torch.float16), "bnb_4bit_compute_dtype must be dtype=.*float16 and bfloat16"),
        (GPTQConfig(bits=4), "must be a BitsAndBytesConfig.*GPTQConfig"),
        ({"quant_method": "gptq", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "quant_method gptq is not here"),
        ({"load_in_4bits": True}, "no field 'load_in_4bits'"),
    ],
)
def test_what_a_quantization_config_may_not_ask_for(checkpoint, config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FastLanguageModel.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)


def test_every_field_of_the_quantization_config_is_known():
    fields = {name for name in BitsAndBytesConfig().to_dict() if not name.startswith("_")}
    assert fields <= set(_DEFAULTS)
    assert {name: value for name, value in BitsAndBytesConfig().to_dict().items() if value and name in _DEFAULTS} == {
        name: value for name, value in _DEFAULTS.items() if value
    }


def test_a_head_left_out_and_storage_are_taken(checkpoint):
    config = four_bits(llm_int8_skip_modules=["lm_head"], bnb_4bit_quant_storage=torch.bfloat16)
    with pytest.warns(UserWarning, match="bnb_4bit_quant_storage='bfloat16' \\("):
        model, _ = FastLanguageModel.from_pretrained(checkpoint, quantization_config=config)
    assert model.engine.model.spec.quantization is not None


@pytest.mark.parametrize(
    ("former", "today", "value"), [("torch_dtype", "dtype", torch.float16), ("use_auth_token", "token", "x")]
)
def test_renamed_arguments_of_from_pretrained(checkpoint, former, today, value):
    with pytest.warns(FutureWarning, match=f"from_pretrained: {former} is called {today} now"):
        model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False, **{former: value})
    assert model.dtype == (torch.float16 if today == "dtype" else torch.float32)


def test_get_peft_model_with_a_config(checkpoint):
    import peft

    with pytest.raises(TypeError, match=r"LoraConfig; write peft.get_peft_model\(model"):
        FastLanguageModel.get_peft_model(None, peft.LoraConfig(r=8))  # type: ignore[arg-type]

"""The recipe: YAML in and out, overrides, and what a wrong field says."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxsloth.recipe import RecipeError, json_schema, load_recipe, make_recipe, parse_yaml

EXAMPLE = Path(__file__).parents[1] / "examples" / "gsm8k_qlora.yaml"
LEAST = {"model": "m", "data": {"path": "d.jsonl"}, "steps": 3}


def test_round_trip():
    recipe = load_recipe(EXAMPLE)
    assert make_recipe(parse_yaml(recipe.to_yaml())) == recipe
    assert recipe.quantization == "nf4-nested" and recipe.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("5E4", 5e4), ("1.5e-05", 1.5e-5), ("-2e1", -20.0)])
def test_scientific_notation_is_a_number(text, value):
    assert parse_yaml(f"x: {text}") == {"x": value}
    assert parse_yaml("x: 1e-3a") == {"x": "1e-3a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": -3}}, "lora.r must be greater than 0, got -3"),
        ({"lora": {"r": True}}, "lora.r must be a valid integer, got true"),
        ({"data": {"path": "d", "max_lenght": 3}}, "data.max_lenght: unknown key; did you mean 'max_length'?"),
        ({"zzz": 1}, "zzz: unknown key; allowed: model, data"),
        ({"quantization": "int3"}, "quantization must be 'none', 'nf4' or 'nf4-nested', got 'int3'"),
        ({"epochs": 1}, "give exactly one of steps and epochs"),
        ({"steps": None}, "give exactly one of steps and epochs"),
        ({"checkpoints": {"best": True}}, "checkpoints.best needs held-out rows"),
        ({"evaluation": {"every": 5}}, "evaluation.every needs held-out rows"),
        ({"schedule": {"warmup_steps": 3, "warmup_ratio": 0.1}}, "give warmup_steps or warmup_ratio, not both"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate must be a finite number, got nan"),
        ({"compute": "fp8", "backend": "jax"}, "compute: fp8 runs on the torch backend so far"),
        ({"compute": "fp8", "dtype": "fp32"}, "compute: fp8 needs dtype bfloat16, got float32"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout must be less than 1, got 1.0"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe(LEAST | changes)
    assert message in str(caught.value)


def test_every_wrong_field_is_listed():
    with pytest.raises(RecipeError) as caught:
        make_recipe(LEAST | {"seed": "x", "batch_size": 0})
    assert "seed must" in str(caught.value) and "batch_size must" in str(caught.value)


def test_overrides():
    recipe = load_recipe(EXAMPLE, ["optimizer.learning_rate=5e-4", "lora.targets=[q_proj, v_proj]", "evaluation.batch_size=3"])
    assert recipe.optimizer.learning_rate == 5e-4
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.evaluation.batch_size == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "must look like key=value"),
        ("=3", "must look like key=value"),
        ("steps.x=3", "'steps' is a value"),
        ("step=3", "step"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(EXAMPLE, [override])


def test_wrong_files(tmp_path):
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")
    for text, message in (("", "must hold a mapping"), ("- 1", "must hold a mapping"), ("a: [", "is not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(tmp_path / "bad.yaml")


def test_differences_leave_out_what_decides_no_number():
    recipe = make_recipe(LEAST)
    assert recipe.differences(make_recipe(LEAST | {"backend": "jax", "log_every": 7, "checkpoints": {"keep": 9}})) == []
    changed = make_recipe(LEAST | {"seed": 4, "lora": {"r": 8}})
    assert recipe.differences(changed) == ["lora.r: 16 -> 8", "seed: 0 -> 4"]


def test_recipes_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(LEAST).seed = 3


def test_schema_has_every_field():
    properties = json_schema()["properties"]
    assert {"model", "data", "lora", "optimizer", "schedule", "steps", "checkpoints", "seed"} <= set(properties)
    assert "max_length" in json_schema()["$defs"]["DataRecipe"]["properties"]

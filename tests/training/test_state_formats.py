"""A run's state as an orbax tree and back, to the bit; what is resumed afterwards goes on as if it had not been away."""

from __future__ import annotations

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import peft
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jaxsloth import cli
from jaxsloth.convert.files import ExistsError
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.models.registry import spec_from_config
from jaxsloth.recipe import RecipeError, make_recipe
from jaxsloth.training import checkpoint as checkpoints
from jaxsloth.training.checkpoint import TrainerState
from jaxsloth.training.fingerprints import Fingerprints, Rows
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.training.state_formats import convert_state
from jaxsloth.transforms import add_lora
from tests.support.tiny import CONFIG, recipe_values

SPEC = add_lora(spec_from_config(CONFIG), r=2, alpha=4, targets=["q_proj"])
ADAPTER = initial_adapters(SPEC, "kaiming", 0, lambda name: np.empty(0))
FILES = ("adapter_model.safetensors", "state.safetensors")


def saved(output, eight_bit=False):
    generator = np.random.Generator(np.random.Philox(5))
    optimizer: dict[str, np.ndarray] = {"count": np.array(3, np.int64)}
    for name, value in ADAPTER.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if eight_bit:
                optimizer[f"{name}.{moment}"] = generator.integers(0, 256, 256, dtype=np.uint8)
                optimizer[f"{name}.{moment}_absmax"] = generator.random(1, np.float32)
            else:
                optimizer[f"{name}.{moment}"] = generator.random(value.shape, np.float32)
    state, nothing = TrainerState(3, "torch", {"seed": 1}, 100, 2.5), Rows(rows=0, tokens=0, digest="", mixture=0)
    marks = Fingerprints(data=nothing, base="b", template="t")
    return checkpoints.save(output, state, SPEC, ADAPTER, optimizer, "base", fingerprints=marks)


def equal(one, other, files=FILES):
    for file in files:
        before, after = load_file(one / file), load_file(other / file)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value.dtype == after[name].dtype and np.array_equal(value, after[name]), name


@pytest.mark.parametrize("eight_bit", [False, True])
def test_there_and_back_to_the_bit(eight_bit, tmp_path):
    folder = saved(tmp_path / "run", eight_bit)
    tree = convert_state(folder, tmp_path / "tree", "orbax")
    back = tmp_path / "again" / "checkpoint-3"
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(tree), str(back), "--to", "run-state"])
    assert ended.value.code == 0
    equal(folder, back)
    assert {file.name for file in back.iterdir()} == {file.name for file in folder.iterdir()}
    for name in ("trainer_state.json", "adapter_config.json", "fingerprints.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert checkpoints.latest(tmp_path / "again").state == checkpoints.load(folder).state
    read = ocp.StandardCheckpointer().restore(tree / "params")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    inner, moments = read["adapter"], read["optimizer"]
    for key in name.split("."):
        inner, moments = inner[key], moments[key]
    assert np.array_equal(inner, ADAPTER[name]) and read["optimizer"]["count"] == 3
    assert np.array_equal(moments["exp_avg"], load_file(folder / FILES[1])[f"{name}.exp_avg"])


def test_a_peft_adapter_there_and_back_to_the_bit(tmp_path):
    """Out of a run's state and through a tree of its own; nothing that only a run has comes along."""
    folder = saved(tmp_path / "run")
    adapter = convert_state(convert_state(folder, tmp_path / "tree", "orbax"), tmp_path / "adapter", "peft")
    assert {file.name for file in adapter.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    again = convert_state(convert_state(adapter, tmp_path / "alone", "orbax"), tmp_path / "again", "peft")
    equal(folder, again, FILES[:1])
    assert (again / "adapter_config.json").read_bytes() == (folder / "adapter_config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"train RECIPE lora.adapter=FOLDER, where .* convert .*alone FOLDER --to peft"):
        convert_state(tmp_path / "alone", tmp_path / "checkpoint-3", "run-state")
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_run_that_begins_from_an_adapter_holds_it(backend, tiny, tmp_path):
    """As the refusal says to; warm-up's first step has the rate 0, so that what is saved behind it is the adapter itself."""
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["k_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.model), config).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=r"must hold an optimizer's state and trainer_state.json") as refused:
        convert_state(tmp_path / "adapter", tmp_path / "checkpoint-1", "run-state")
    *_, override = str(refused.value).split()
    schedule = {"kind": "constant", "warmup_steps": 1}
    values = recipe_values(tiny.model, tiny.rows, tmp_path / "run", lora={}, schedule=schedule, steps=1, backend=backend)
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "recipe.yaml"), override, "--quiet"])
    assert ended.value.code == 0
    tree = convert_state(tmp_path / "run" / "checkpoint-1", tmp_path / "tree", "orbax")
    state = convert_state(tree, tmp_path / "again" / "checkpoint-1", "run-state")
    equal(
        tmp_path / "adapter", convert_state(convert_state(state, tmp_path / "t", "orbax"), tmp_path / "back", "peft"), FILES[:1]
    )
    with pytest.raises(RecipeError, match="adapter says its r, targets itself; leave them out"):
        make_recipe(values | {"lora": {"adapter": "a", "r": 4, "dropout": 0.1, "targets": ["q_proj"]}})


def test_what_is_damaged_or_there_is_refused(tmp_path):
    folder = saved(tmp_path / "run")
    with pytest.raises(ExistsError, match="--overwrite"):
        convert_state(folder, tmp_path / "run", "orbax")
    with pytest.raises(ValueError, match="must be one of orbax, run-state, peft; got 'zip'"):
        convert_state(folder, tmp_path / "out", "zip")
    tree = convert_state(folder, tmp_path / "tree", "orbax")
    marks = json.loads((tree / "fingerprints.json").read_text())
    assert set(marks["files"]) == {"adapter", "optimizer"}
    (tree / "fingerprints.json").write_text(json.dumps(marks | {"files": {**marks["files"], "optimizer": "0" * 32}}))
    with pytest.raises(CheckpointError, match=r"tree: state.safetensors holds other values than the checkpoint was saved with"):
        convert_state(tree, tmp_path / "checkpoint-3", "run-state")
    del marks["files"]  # of an older version: what is written knows its files all the same
    (tree / "fingerprints.json").write_text(json.dumps(marks))
    made = convert_state(tree, tmp_path / "checkpoint-3", "run-state")
    assert (made / "fingerprints.json").read_bytes() == (folder / "fingerprints.json").read_bytes()
    state = (tree / "trainer_state.json").read_text()
    (tree / "trainer_state.json").write_text(state.replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match="Adam's count must be the step, 4, got 3"):
        convert_state(tree, tmp_path / "out", "run-state")
    (tree / "trainer_state.json").write_text(state)
    with pytest.raises(CheckpointError, match="must be called checkpoint-3, got out"):
        convert_state(tree, tmp_path / "out", "run-state")
    for data in (tree / "params" / "d", tree / "params" / "ocdbt.process_0"):
        shutil.rmtree(data)
    with pytest.raises(CheckpointError, match=r"can't be (read|opened)"):
        convert_state(tree, tmp_path / "out", "peft")
    (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"state.safetensors is not a whole safetensors file"):
        convert_state(folder, tmp_path / "out", "orbax")
    assert not (tmp_path / "out").exists()

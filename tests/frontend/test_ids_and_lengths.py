"""Token ids that the model has not, and rows longer than its positions, at every door."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch

from jaxsloth import FastLanguageModel
from jaxsloth.batch import _warn_of_length
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import row_reader
from jaxsloth.frontend import arguments
from jaxsloth.generation import GenerationSettings, generate
from jaxsloth.recipe import DataRecipe
from tests.support.modules import BACKENDS
from tests.support.tiny import write_checkpoint

WRAPS = 2**32 + 5  # 5 in 32 bits


@pytest.fixture(scope="module", params=BACKENDS)
def model(request, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("ids") / "model", num_hidden_layers=1, max_position_embeddings=64)
    return FastLanguageModel.from_pretrained(str(folder), backend=request.param, load_in_4bit=False, max_seq_length=64)[0]


@pytest.mark.parametrize("wrong", [WRAPS, 260, -1])
def test_ids_outside_the_vocabulary_are_named(model, wrong):
    ids = torch.tensor([[5, 6], [7, wrong]])
    labels = torch.tensor([[-100, 6], [7, wrong]])
    message = rf"from 0 to 259, got {wrong} at \[\d, 1\]"  # beams have rows of their own
    for door in (
        lambda: model(ids),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model.generate(ids, max_new_tokens=2, num_beams=2),
    ):
        with pytest.raises(ValueError, match=f"input_ids must be token ids of the model, {message}"):
            door()
    with pytest.raises(ValueError, match=rf"prompt 1 must be .*got {wrong} at \[1\]"):
        generate(model.engine.model, ids.tolist(), GenerationSettings(max_new_tokens=2))
    with pytest.raises(ValueError, match="labels must be token ids"):
        model(torch.ones_like(ids), labels=labels)


def test_ids_that_are_no_whole_numbers_are_not_cut(model):
    """Of the module, which transformers refuses too, and of rows of ids."""
    for door in (lambda: model(torch.tensor([[5.7]])), lambda: model.generate(torch.tensor([[5.7]]), max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"input_ids must be whole numbers"):
            door()
    with pytest.raises(ValueError, match=r"prompt 1 must be whole numbers, got float64"):
        model.generate([[5], [5.7]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 6, 7], "prompt 0 must be a row of token ids, got int"),
        (["a", [5]], "prompt 0 must be a row of token ids, got str"),
        (torch.tensor([5, 6]), r"input_ids must be \[batch, length\] with at least one token, got \(2,\)"),
        (np.array([[5, 6]]), "input_ids must be a tensor, got ndarray"),
    ],
)
def test_prompts_of_another_shape(model, ids, message):
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate(ids, max_new_tokens=2)
    if not isinstance(ids, list):
        with pytest.raises((TypeError, ValueError), match=message):
            model(ids)
    for other in ([[5, 6]], np.array([[5, 6]])):
        with pytest.raises(TypeError, match=r"input_ids must be a tensor.*return_tensors='pt'"):
            model.generate(input_ids=other, max_new_tokens=2)


@pytest.mark.parametrize(
    ("wrong", "shown"), [(10**20, str(10**20)), (260, "260"), ([1, 300], "300"), (1.5, "1.5"), ("a", "'a'")]
)
def test_ends_outside_the_vocabulary_are_named(model, wrong, shown):
    """They would end no answer, and nobody would know."""
    message = rf"eos_token_id must be token ids of the model, from 0 to 259, got {shown}"
    ids = torch.tensor([[5, 6]])
    for more in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=2, eos_token_id=wrong, **more)
    with pytest.raises(ValueError, match=message):
        model.generate([[5, 6]], max_new_tokens=2, eos_ids=tuple(wrong) if isinstance(wrong, list) else (wrong,))
    assert model.generate(ids, max_new_tokens=2, eos_token_id=-1).shape == (1, 4)  # scripts say so that nothing ends it


def test_halves_of_characters_in_a_prompt_are_named(model):
    with pytest.raises(ValueError, match=r"of whole characters, got the lone surrogate '\\ud800' at 2 of"):
        model.generate("ab\ud800", max_new_tokens=2)


def test_ids_of_training_rows_do_not_wrap():
    row = {"input_ids": [5, WRAPS]}
    with pytest.raises(DataError, match=f"input_ids must hold token ids, got {WRAPS}, which no vocabulary has"):
        row_reader(DataRecipe(path="in memory"), row)(row)


def test_rows_longer_than_the_positions_are_told_of_once(model, caplog):
    _warn_of_length.cache_clear()
    with caplog.at_level(logging.WARNING, "jaxsloth"):
        model(torch.ones(1, 64, dtype=torch.long))
        model.generate(torch.ones(1, 62, dtype=torch.long), max_new_tokens=2)
        assert not caplog.records
        model(torch.ones(1, 65, dtype=torch.long))
        model.generate(torch.ones(1, 63, dtype=torch.long), max_new_tokens=2)
    assert caplog.text.count("more than the 64 positions that the model was made for") == 1
    _warn_of_length.cache_clear()
    with caplog.at_level(logging.WARNING, "jaxsloth"):
        model.generate(torch.ones(1, 63, dtype=torch.long), max_new_tokens=2)
    assert caplog.text.count("more than the 64 positions") == 2


def test_rows_longer_than_max_seq_length_are_told_of_once(model, monkeypatch):
    monkeypatch.setattr(arguments, "_said", set())
    monkeypatch.setattr(model, "max_seq_length", 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for length in (8, 9, 10):
            model(torch.ones(1, length, dtype=torch.long))
    assert [str(warning.message) for warning in said] == [
        "rows longer than max_seq_length=8, which the model was loaded with, are run whole"
    ]

"""Token ids that the model has not, and rows longer than its positions, at every door."""

from __future__ import annotations

import logging

import pytest
import torch

from jaxsloth import FastLanguageModel
from jaxsloth.batch import _warn_of_length
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import row_reader
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

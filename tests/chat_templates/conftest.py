"""SmolLM2's real tokenizer; a test may change its own."""

import copy

import pytest

from jaxsloth.data.tokenizer import load_tokenizer
from tests.data.conftest import SMOLLM2


@pytest.fixture(scope="session")
def loaded():
    return load_tokenizer(SMOLLM2)


@pytest.fixture
def smollm2(loaded):
    return copy.deepcopy(loaded)

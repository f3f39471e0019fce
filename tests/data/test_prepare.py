"""From files to examples, held-out rows included; and the tokenizer of a checkpoint."""

import json

import pytest
from transformers import AutoTokenizer

from jaxsloth.data.errors import DataError
from jaxsloth.data.prepare import prepare
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.recipe import DataRecipe


@pytest.fixture
def rows_file(tmp_path):
    def write(name, count):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": f"eggs {i}"}) + "\n" for i in range(count)))
        return str(file)

    return write


def texts(examples, tokenizer):
    return [tokenizer.decode(e.tokens, skip_special_tokens=True) for e in examples]


def test_no_held_out_rows(rows_file, tiny):
    train, held_out = prepare(DataRecipe(path=rows_file("a.jsonl", 5), limit=3), tiny, 0)
    assert texts(train, tiny) == ["eggs 0", "eggs 1", "eggs 2"]
    assert held_out is None


def test_fraction(rows_file, tiny):
    recipe = DataRecipe(path=rows_file("a.jsonl", 20), validation_fraction=0.25)
    train, held_out = prepare(recipe, tiny, 0)
    assert held_out is not None
    assert len(held_out) == 5
    assert sorted(texts(train + held_out, tiny)) == sorted(f"eggs {i}" for i in range(20))
    assert texts(prepare(recipe, tiny, 0)[1], tiny) == texts(held_out, tiny)
    assert texts(prepare(recipe, tiny, 1)[1], tiny) != texts(held_out, tiny)


def test_validation_file(rows_file, tiny):
    recipe = DataRecipe(path=rows_file("a.jsonl", 3), validation_path=rows_file("b.jsonl", 2), limit=1)
    train, held_out = prepare(recipe, tiny, 0)
    assert held_out is not None
    assert (len(train), len(held_out)) == (1, 2)


def test_tokenizer_of_a_folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    text = "sixteen eggs"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]


def test_absent_tokenizers(tmp_path):
    with pytest.raises(DataError, match=r"must hold tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no checkpoint at"):
        load_tokenizer(tmp_path / "gone.gguf")
    with pytest.raises(DataError, match="no checkpoint at"):
        load_tokenizer(tmp_path / "gone")

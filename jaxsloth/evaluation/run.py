"""A model measured on rows: its loss on the answers, and the answers that it writes itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxsloth import terminal
from jaxsloth.backend import Backend, BuildOptions, DtypeName, Model
from jaxsloth.batch import IGNORE
from jaxsloth.convert.checkpoint import find_checkpoint, resolve_path
from jaxsloth.convert.files import ExistsError, write_text
from jaxsloth.convert.peft_adapter import base_model_of, find_adapter, fitted_adapter
from jaxsloth.data.encode import encode_rows
from jaxsloth.data.errors import DataError
from jaxsloth.data.formats import Conversation, row_reader
from jaxsloth.data.sources import load_rows
from jaxsloth.data.step_batches import eval_batches
from jaxsloth.data.templates import ChatTemplate
from jaxsloth.data.tokenizer import load_tokenizer
from jaxsloth.evaluation.metrics import FROM_TARGETS, EvaluationError, check_metrics, text_scores
from jaxsloth.generation import GenerationSettings, answering, generate
from jaxsloth.recipe import DataRecipe
from jaxsloth.training.run import choose_backend
from jaxsloth.transforms import quantize

_PAD = 64  # few lengths, so that a compiling backend compiles few programs
_TOKENIZER = "tokenizer_config.json"
Scores = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a model wrote where `reference` stands in the data."""

    prompt: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """Scores by stage ("base", "adapter"), and the answers that they are of, where a metric needed any."""

    rows: int
    scores: dict[str, Scores]
    answers: dict[str, list[Answer]]

    @property
    def change(self) -> Scores:
        """adapter - base, where both were measured."""
        if len(self.scores) < 2:
            return {}
        base, adapter = self.scores["base"], self.scores["adapter"]
        return {name: adapter[name] - base[name] for name in base}


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate, on what, and how.

    model: what `jaxsloth generate` takes, or the folder of a PEFT adapter, whose base is then loaded with it.
    compare_base: measure the base as well, before its adapter is added.
    batch_size: rows over all devices.
    json_file: where the scores and the answers are written; it must not exist yet.
    """

    model: str
    data: DataRecipe
    metrics: Sequence[str]
    adapter: str | None = None
    compare_base: bool = False
    limit: int | None = None
    backend: str | None = None
    dtype: DtypeName | None = None
    load_in_4bit: bool = False
    batch_size: int = 8
    max_new_tokens: int = 128
    json_file: Path | None = None


def data_settings(**fields: Any) -> DataRecipe:
    """A recipe's `data` section; EvaluationError names the field that can't be."""
    try:
        return DataRecipe(**fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise EvaluationError(problems) from error


def pairs(columns: Sequence[str]) -> dict[str, str]:
    """``["prompt=question"]`` -> ``{"prompt": "question"}``."""
    wrong = [column for column in columns if not all(column.partition("="))]
    if wrong:
        raise EvaluationError(f"a column must be given as expected=field, such as prompt=question, got {wrong[0]!r}")
    return {expected: field for expected, _, field in (column.partition("=") for column in columns)}


def dtype_name(dtype: str | None) -> DtypeName | None:
    """The name itself, where it is one."""
    if dtype is not None and dtype not in get_args(DtypeName):
        raise EvaluationError(f"dtype must be one of {', '.join(get_args(DtypeName))}, got {dtype!r}")
    return cast(DtypeName | None, dtype)


def evaluate(settings: EvaluationSettings, console: Console | None = None) -> Evaluation:
    """Loads a model, perhaps with an adapter, and measures it.

    Args:
        console: where the progress bar is drawn; stderr where None.

    Raises:
        ValueError: (EvaluationError, DataError, CheckpointError …) whatever can't be, found before weights are read where it
            can be.
    """
    metrics = check_metrics(settings.metrics)
    if settings.batch_size < 1 or settings.max_new_tokens < 1:
        raise EvaluationError(
            f"batch_size and max_new_tokens must be at least 1, got {settings.batch_size} and {settings.max_new_tokens}"
        )
    if settings.json_file is not None and settings.json_file.exists():
        raise ExistsError(f"{settings.json_file} exists already; choose another file, or remove it")
    name, folder = _adapter_of(settings)
    opened = find_checkpoint(name)
    spec = opened.spec()
    if settings.load_in_4bit:
        spec = quantize(spec, nested=True)
    adapter = None if folder is None else fitted_adapter(folder, spec)
    has_own = folder is not None and (folder / _TOKENIZER).is_file()
    tokenizer = load_tokenizer(folder if has_own and folder is not None else opened.path)
    rows = load_rows(settings.data.path, settings.data.split, settings.limit)
    backend = choose_backend(settings.backend or "auto")
    subject = Subject(rows, tokenizer, settings.data, metrics, backend.devices().count, spec.embedding.vocab, opened.generation)
    model = backend.build(spec, opened.source, BuildOptions(settings.dtype or _default_dtype(backend), "none"))
    stages = {"base": subject.measure(model, settings, "base", console)} if adapter is None or settings.compare_base else {}
    if adapter is not None:
        model.add_adapters(*adapter)
        stages["adapter"] = subject.measure(model, settings, "adapter", console)
    found = Evaluation(
        len(rows),
        {stage: scores for stage, (scores, _) in stages.items()},
        {stage: answers for stage, (_, answers) in stages.items() if answers},
    )
    if settings.json_file is not None:
        _write_json(settings.json_file, settings, found)
    return found


def _adapter_of(settings: EvaluationSettings) -> tuple[str, Path | None]:
    """(the base's name, the adapter's folder or None)."""
    name, own = settings.model, find_adapter(settings.model)
    if own is not None:
        if settings.adapter is not None:
            raise EvaluationError(
                f"{name} is an adapter itself, and the adapter {settings.adapter} came too; give the base as the model"
            )
        return base_model_of(own), own
    if settings.adapter is None:
        if settings.compare_base:
            raise EvaluationError("comparing with the base needs an adapter; give its folder, or leave the comparison out")
        return name, None
    return name, resolve_path(settings.adapter)


def _default_dtype(backend: Backend) -> DtypeName:
    return "float32" if backend.devices().platform == "cpu" else "bfloat16"


class Subject:
    """Rows to measure models on, made ready once for all of them.

    Args:
        metrics: of `METRICS`, checked.
        devices: a batch's rows are a multiple of it.
        generation: generation_config.json's fields; its repetition_penalty counts in answers, its sampling does not.

    Raises:
        DataError: rows that can't be read; rows without a prompt and an answer where a metric compares answers.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        data: DataRecipe,
        metrics: Sequence[str],
        devices: int,
        vocab_size: int,
        generation: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.tokenizer, self.metrics, self.data, self.devices = tokenizer, metrics, data, devices
        self.greedy = answering(generation, {"do_sample": False})  # scores must not be luck
        self.examples = encode_rows(rows, tokenizer, data, vocab_size)
        self.questions = [] if set(metrics) <= set(FROM_TARGETS) else _questions(rows, tokenizer, data)

    def measure(
        self, model: Model, settings: EvaluationSettings, title: str, console: Console | None = None
    ) -> tuple[Scores, list[Answer]]:
        """The scores of a model, and its answers."""
        scores: Scores = {}
        answers: list[Answer] = []
        with _bar(console or terminal.console(stderr=True)) as bar:
            if "loss" in self.metrics:
                scores |= self._loss(model, settings.batch_size, bar, f"{title}: loss")
            if "accuracy" in self.metrics:
                scores["accuracy"] = self._accuracy(model, bar, f"{title}: accuracy")
            if self.questions:
                answers = self._answers(model, settings, bar, f"{title}: answers")
        if answers:
            said, meant = [item.answer for item in answers], [item.reference for item in answers]
            scores |= text_scores(self.metrics, said, meant)
        return scores, answers

    def _loss(self, model: Model, batch_size: int, bar: Progress, title: str) -> Scores:
        """Summed over every learnt token of the set, divided by their count; and its exponential."""
        step, totals = model.eval_step(), []
        for batch in bar.track(
            eval_batches(self.examples, batch_size, _PAD, self.data.max_length, self.devices), description=title
        ):
            total, count = step(batch)
            totals.append((float(total), count))
        loss = sum(total for total, _ in totals) / sum(count for _, count in totals)
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def _accuracy(self, model: Model, bar: Progress, title: str) -> float:
        """The share of learnt tokens that are the likeliest after those before them; a row at a time, as logits are big."""
        right = count = 0
        for batch in bar.track(eval_batches(self.examples, 1, _PAD, self.data.max_length, self.devices), description=title):
            asked = batch.targets != IGNORE
            right += int(np.count_nonzero(model.logits(batch).argmax(-1)[asked] == batch.targets[asked]))
            count += int(np.count_nonzero(asked))
        return right / count

    def _answers(self, model: Model, settings: EvaluationSettings, bar: Progress, title: str) -> list[Answer]:
        """Greedy answers, rows of like length together."""
        prompts = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt, _ in self.questions]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        own = self.tokenizer.eos_token_id
        eos = set(model.spec.eos_ids) | ({own} if own is not None else set())
        chosen = GenerationSettings(max_new_tokens=settings.max_new_tokens, eos_ids=tuple(eos), **self.greedy)
        said: dict[int, str] = {}
        task = bar.add_task(title, total=len(prompts))
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            for row, tokens in zip(rows, generate(model, [prompts[row] for row in rows], chosen), strict=True):
                said[row] = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            bar.update(task, advance=len(rows))
        return [Answer(prompt, reference, said[row]) for row, (prompt, reference) in enumerate(self.questions)]


def _questions(rows: Sequence[Mapping[str, Any]], tokenizer: Any, data: DataRecipe) -> list[tuple[str, str]]:
    """(prompt as the template writes it, the last answer) of each row."""
    read, template = row_reader(data, rows[0]), ChatTemplate(tokenizer, data.template)
    found = []
    for number, row in enumerate(rows):
        content = read(row)
        if not isinstance(content, Conversation) or content.messages[-1]["role"] != "assistant" or len(content.messages) < 2:
            raise DataError(
                f"row {number} (counted from 0) has no prompt and answer, and metrics that compare answers need them: give "
                "conversations that end in an answer, prompts with completions or alpaca rows, or measure only "
                + " and ".join(FROM_TARGETS)
            )
        *before, last = content.messages
        found.append((template.render(before, answer_follows=True), last["content"].strip()))
    return found


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def table(found: Evaluation) -> Table:
    """A line a metric, a column a stage, and the change where there are two."""
    shown = Table(title=f"{found.rows} rows")
    shown.add_column("metric")
    for stage in found.scores:
        shown.add_column(stage, justify="right")
    if found.change:
        shown.add_column("change", justify="right")
    for name in next(iter(found.scores.values())):
        values = [f"{scores[name]:.4f}" for scores in found.scores.values()]
        shown.add_row(name, *values, *([f"{found.change[name]:+.4f}"] if found.change else []))
    return shown


def _write_json(file: Path, settings: EvaluationSettings, found: Evaluation) -> None:
    """Everything measured, with the answers, as one JSON object."""
    values = {
        "model": settings.model,
        "adapter": settings.adapter,
        "data": settings.data.path,
        "rows": found.rows,
        "scores": found.scores,
        "change": found.change,
        "answers": {stage: [vars(answer) for answer in answers] for stage, answers in found.answers.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")

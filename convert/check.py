"""Checking a checkpoint against another of the same model: each is run by its own ecosystem's reader, and their next-token
distributions, their best tokens and their token ids are compared. What ``--check`` and ``jaxsloth check`` call."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsloth.convert.check_readers import MERGED, READERS, Reading
from jaxsloth.convert.checkpoint import Checkpoint, find_checkpoint
from jaxsloth.convert.gguf_source import GgufSource
from jaxsloth.convert.gguf_tokenizer import CONTROL, USER_DEFINED
from jaxsloth.convert.gguf_types import OUT_TYPES
from jaxsloth.convert.run import Options, convert, plan
from jaxsloth.convert.safetensors_source import CheckpointError
from jaxsloth.extras import require
from jaxsloth.foreign import read_object, read_text

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius, which is",
    "Question: What is 12 + 30? Answer:",
    "Der schnelle braune Fuchs springt über",
)
HARD_TEXTS = (
    "two  spaces,   three, and a tail  ",
    "digits 7 42 1234567890 3.14159 1e-5",
    "emoji 😀 👩‍👩‍👧 and flags 🇫🇷",
    "漢字とかな 한국어 中文。",
    "naïve café\n\n\tif x == 'it''s':\r\n",
    "Don't WE'LL they've  مرحبا Привет",
)
# The share of the adapter's movement that a merge must show.
MOVED = (0.5, 1.5)
_STILL = 1e-9  # an adapter that moves the distributions by less than this mean KL moves nothing


@dataclass(frozen=True)
class Bar:
    """Nats of the mean and of the largest KL, and the share of tokens whose likeliest successor must be the same."""

    mean_kl: float
    largest_kl: float
    top1: float


# llama.cpp's log-probabilities are off by up to 2e-4: it sums the softmax of a whole vocabulary in float32, one by one.
LLAMA_CPP = Bar(2e-4, 5e-3, 0.97)
_F32, _5, _NF4, _4_0 = Bar(1e-6, 1e-5, 0.99), Bar(0.35, 3.0, 0.65), Bar(1.0, 7.0, 0.5), Bar(1.5, 20.0, 0.3)
# By how the most values are stored: about twice SmolLM2-135M's mean and three times its largest (docs/convert.md, with what was
# measured). Small models suffer more from rounding than large ones do, so a large one that meets its bar may still be damaged.
BARS: dict[str, Bar] = {
    "F32": _F32,
    "F64": _F32,
    "F16": Bar(2e-5, 5e-4, 0.97),
    "BF16": Bar(1e-3, 1e-2, 0.94),
    "Q8_0": Bar(0.02, 0.3, 0.85),
    "Q6_K": Bar(0.07, 0.6, 0.8),
    "Q5_0": _5,
    "Q5_1": _5,
    "Q5_K": _5,
    "Q4_K": Bar(0.35, 3.0, 0.6),
    "Q4_0": _4_0,
    "Q4_1": _4_0,
    "IQ4_NL": _NF4,
    "IQ4_XS": _NF4,
    "NF4": _NF4,
    "INT8": Bar(0.09, 0.6, 0.75),
    "Q3_K": _4_0,
    "Q2_K": _4_0,
}


@dataclass(frozen=True)
class Moved:
    """Mean KL in nats, base to base + adapter and base to merged; share: of the adapter's change of the log-probabilities, what
    the merge shows (1: all of it, 0: none)."""

    by_adapter: float
    by_merge: float
    share: float


@dataclass(frozen=True)
class Checked:
    """What `check` found. readers: who read source and destination. stored_as: what the bar is for. differing: texts whose ids
    differ, with both ids. misses: what failed, in words; none where all held."""

    readers: tuple[str, str]
    stored_as: str
    bar: Bar
    tokens: int
    mean_kl: float
    largest_kl: float
    top1: float
    texts: int
    differing: tuple[tuple[str, list[int], list[int]], ...]
    moved: Moved | None
    notes: tuple[str, ...]

    @property
    def misses(self) -> tuple[str, ...]:
        found = []
        if not self.mean_kl <= self.bar.mean_kl:
            found.append(f"the mean KL must be at most {self.bar.mean_kl:g}, got {self.mean_kl:.3g}")
        if not self.largest_kl <= self.bar.largest_kl:
            found.append(f"the largest KL must be at most {self.bar.largest_kl:g}, got {self.largest_kl:.3g}")
        if not self.top1 >= self.bar.top1:
            found.append(f"the likeliest token must agree for {self.bar.top1:.0%} of the tokens, got {self.top1:.1%}")
        if self.differing:
            text, want, got = self.differing[0]
            found.append(f"token ids differ in {len(self.differing)} of {self.texts} texts, first {text!r}: {want} and {got}")
        if self.moved is not None and self.moved.by_adapter > _STILL and not MOVED[0] <= self.moved.share <= MOVED[1]:
            found.append(
                f"the merge must move the log-probabilities as the adapter does ({MOVED[0]} to {MOVED[1]} of it), got "
                f"{self.moved.share:.2f}"
            )
        return tuple(found)


def prompts_of(file: Path) -> tuple[str, ...]:
    """A prompt a line; empty lines are left out.

    Raises:
        CheckpointError: the file can't be read, or holds no prompt.
    """
    found = tuple(line for line in read_text(file, CheckpointError).splitlines() if line.strip())
    if not found:
        raise CheckpointError(f"{file} must hold a prompt a line, and is empty")
    return found


def check_possible(source: Checkpoint, kind: str, merge: Path | None) -> None:
    """That what a check needs is there: packages, and the source's tokenizer. Called before anything is written.

    Raises:
        MissingExtraError: names the packages and the extra. CheckpointError: there is no reader, or no tokenizer.
    """
    for one in (source.kind, kind):
        if one not in READERS:
            raise CheckpointError(f"a check has no reader for {one}; it has them for {', '.join(READERS)}")
    first = MERGED.packages if merge is not None else READERS[source.kind].packages
    need = (*first, *READERS[source.kind].packages) if merge is not None and source.kind != "gguf" else first
    require("check", "the check", only=(*need, *READERS[kind].packages))
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if source.kind != "gguf" and not any((source.path / name).is_file() for name in files):
        raise CheckpointError(f"{source.path} holds no tokenizer, which a check needs for its prompts")


def check(
    source: str,
    destination: str,
    *,
    merge: Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    tell: Callable[[str], None] = lambda line: None,
) -> Checked:
    """Runs both on the same tokens and compares. One is in memory at a time, whole, in float32 where transformers reads it.

    Args:
        source, destination: a folder, a .gguf file, package:NAME/file, or a Hugging Face name.
        merge: the adapter that the destination holds merged; PEFT applies it to the source (a GGUF one, as PEFT's).
        tell: told what is read next.

    Raises:
        CheckpointError: one of them can't be read, by us or by its own reader. MissingExtraError: a package is missing.
    """
    one, other = (find_checkpoint(name, to_convert=True) for name in (source, destination))
    check_possible(one, other.kind, merge)
    texts = (*HARD_TEXTS, *(f"a {token} b{token}" for token in added_tokens(one)[:4]))
    applies = READERS["orbax"] if one.kind == "orbax" else MERGED
    first, second = applies if merge is not None else READERS[one.kind], READERS[other.kind]
    tell(f"reading {one.path} with {first.name}")
    with _peft_folder(source, merge) as adapter:
        want = first.read(one.path, adapter, texts, prompts)
    base = applies.read(one.path, None, (), want.prompts) if merge is not None else None
    tell(f"reading {other.path} with {second.name}")
    got = second.read(other.path, None, texts, want.prompts)
    bar = BARS[stored_as(other)]
    if "gguf" in (one.kind if merge is None else "", other.kind):
        bar = wider(bar, LLAMA_CPP)
    if one.kind == "gguf" and merge is None and stored_as(one) not in ("F32", "F16", "BF16"):
        # llama.cpp rounds activations to 8 bits where weights are quantized, whatever the destination is.
        bar = wider(bar, BARS["Q8_0"])
    return compared((first.name, second.name), (stored_as(other), bar), texts, want, got, base)


@contextmanager
def _peft_folder(base: str, adapter: Path | None) -> Iterator[Path | None]:
    """An adapter as PEFT reads it."""
    if adapter is None or adapter.is_dir():
        yield adapter
        return
    with tempfile.TemporaryDirectory() as folder:
        yield convert(plan(str(adapter), Path(folder) / "adapter", "peft", Options(base=base)))


def compared(
    readers: tuple[str, str],
    stored: tuple[str, Bar],
    texts: Sequence[str],
    want: Reading,
    got: Reading,
    base: Reading | None,
) -> Checked:
    """What two readings of the same texts and prompts have and have not in common.

    Args:
        stored: how the second is stored, and the bar for that.
        base: what the first reader makes of the model without its adapter, where there is one.
    """
    notes = []
    widths = {want.log_probs[0].shape[1], got.log_probs[0].shape[1]}
    if len(widths) > 1:
        notes.append(f"the vocabularies have {min(widths)} and {max(widths)} rows; the first {min(widths)} are compared")
    divergence, agree = _compared(want, got)
    differing = tuple(
        (text, mine, theirs) for text, mine, theirs in zip(texts, want.texts, got.texts, strict=True) if mine != theirs
    )
    moved = _moved(base, want, got) if base is not None else None
    if moved is not None and moved.by_adapter <= _STILL:
        notes.append("the adapter itself moves nothing, so that a merge can't be told from none")
    return Checked(
        readers,
        *stored,
        len(divergence),
        float(divergence.mean()),
        float(divergence.max()),
        float(agree.mean()),
        len(texts),
        differing,
        moved,
        tuple(notes),
    )


def wider(one: Bar, other: Bar) -> Bar:
    return Bar(max(one.mean_kl, other.mean_kl), max(one.largest_kl, other.largest_kl), min(one.top1, other.top1))


def stored_as(checkpoint: Checkpoint) -> str:
    """How a checkpoint's values are stored: of a GGUF file that says its kind that kind's, else what most values are stored in.

    Raises:
        CheckpointError: there is no bar for it.
    """
    source, counts = checkpoint.source, Counter[str]()
    for name in source.names():
        kind = source.block_type(name) if isinstance(source, GgufSource) else source.stored_as(name)
        counts[kind] += int(np.prod(source.shape(name)))
    most = counts.most_common(1)[0][0]
    if isinstance(source, GgufSource):
        kinds = {kind.file_type: kind.tensor_type("ffn_up", 1, 32, 1) for kind in OUT_TYPES.values()}
        said = source.file_type()
        most = most if said is None else kinds.get(said, most)
    if most not in BARS:
        raise CheckpointError(f"{checkpoint.path} is stored as {most}, for which there is no bar; known: {', '.join(BARS)}")
    return most


def added_tokens(checkpoint: Checkpoint) -> list[str]:
    """The tokens that a tokenizer finds whole before it splits a text."""
    if isinstance(checkpoint.source, GgufSource):
        fields = checkpoint.source.tokenizer_fields()
        named = zip(fields.get("tokenizer.ggml.tokens", ()), fields.get("tokenizer.ggml.token_type", ()), strict=False)
        return [token for token, kind in named if kind in (CONTROL, USER_DEFINED)]
    file = checkpoint.path / "tokenizer.json"
    return [token["content"] for token in read_object(file, CheckpointError).get("added_tokens", ())] if file.is_file() else []


def _compared(want: Reading, got: Reading) -> tuple[np.ndarray, np.ndarray]:
    """KL (want, got) of each token in nats, and whether the likeliest token is the same."""
    divergence, agree = [], []
    for one, other in zip(want.log_probs, got.log_probs, strict=True):
        a, b = _common(one, other)
        divergence.append(_kl(a, b))
        agree.append(a.argmax(1) == b.argmax(1))
    return np.concatenate(divergence), np.concatenate(agree)


def _kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of log-probabilities ``[tokens, vocabulary]``, what one of them does not tell in one bucket; NaN where either is NaN."""
    told = ~np.isneginf(a) & ~np.isneginf(b)
    with np.errstate(invalid="ignore"):
        terms = np.where(told, np.exp(a) * (a - b), 0.0).sum(1)
    rest, other = (np.maximum(1.0 - np.where(told, np.exp(row), 0.0).sum(1), 1e-12) for row in (a, b))
    rest_terms = np.where(told.all(1), 0.0, rest * np.log(rest / other))
    return np.maximum(terms + rest_terms, 0.0)


def _common(*rows: np.ndarray) -> list[np.ndarray]:
    """float64, over the columns that all have; summing to 1 again where columns were cut from what is told whole."""
    width = min(row.shape[1] for row in rows)
    cut = [row[:, :width].astype(np.float64) for row in rows]
    whole = [row - np.log(np.exp(row).sum(1, keepdims=True)) for row in cut]
    return [row if np.isneginf(row).any() else other for row, other in zip(cut, whole, strict=True)]


def _moved(base: Reading, want: Reading, got: Reading) -> Moved:
    """The merge's change of the log-probabilities, projected on the adapter's and weighted by the base's probabilities.
    Rounding points elsewhere, so that a coarse format does not hide whether the merge is there."""
    by_adapter, by_merge, along, whole = [], [], 0.0, 0.0
    for rows in zip(base.log_probs, want.log_probs, got.log_probs, strict=True):
        plain, adapted, merged = _common(*rows)
        by_adapter.append(_kl(plain, adapted))
        by_merge.append(_kl(plain, merged))
        told = ~np.isneginf(merged)
        weight, change = np.where(told, np.exp(plain), 0.0), adapted - plain
        along += float((weight * change * np.where(told, merged - plain, 0.0)).sum())
        whole += float((weight * change * change).sum())
    share = along / whole if whole else 0.0
    return Moved(float(np.concatenate(by_adapter).mean()), float(np.concatenate(by_merge).mean()), share)

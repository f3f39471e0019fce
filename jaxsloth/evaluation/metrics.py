"""What is measured of answers: their overlap with the references, by the packages and formulas that papers use."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxsloth.extras import require

METRICS = ("loss", "accuracy", "exact_match", "f1", "rouge", "bleu")
FROM_TARGETS = ("loss", "accuracy")  # the others compare answers that must be generated
_ROUGES = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class EvaluationError(ValueError):
    """An evaluation that can't be done as asked."""


def check_metrics(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, in METRICS' order.

    Raises:
        EvaluationError: no name, one that is no metric, or one whose packages are not installed.
    """
    asked = {name.strip() for name in names if name.strip()}
    unknown = sorted(asked - set(METRICS))
    if unknown or not asked:
        raise EvaluationError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}")
    if asked & {"rouge", "bleu"}:
        require("evaluate", "measuring rouge or bleu", EvaluationError)
    return tuple(name for name in METRICS if name in asked)


def text_scores(names: Sequence[str], answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The metrics among `names` that compare texts, each a number for the whole set.

    exact_match and f1 are SQuAD's, means over rows in [0, 1]; rouge is rouge-score's F-measure of rouge1, rouge2 and rougeL
    without stemming, means over rows in [0, 1]; bleu is sacrebleu's of the corpus, 0 to 100.
    """
    scores: dict[str, float] = {}
    pairs = list(zip(answers, references, strict=True))
    if "exact_match" in names:
        scores["exact_match"] = _mean(float(normalize(answer) == normalize(reference)) for answer, reference in pairs)
    if "f1" in names:
        scores["f1"] = _mean(f1(answer, reference) for answer, reference in pairs)
    if "rouge" in names:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(_ROUGES), use_stemmer=False)
        measured = [scorer.score(reference, answer) for answer, reference in pairs]
        scores |= {name: _mean(row[name].fmeasure for row in measured) for name in _ROUGES}
    if "bleu" in names:
        from sacrebleu.metrics.bleu import BLEU

        scores["bleu"] = BLEU().corpus_score(list(answers), [list(references)]).score
    return scores


def normalize(text: str) -> str:
    """SQuAD's normalization (Rajpurkar et al. 2016, arXiv:1606.05250): lower case, no punctuation, articles or extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, reference: str) -> float:
    """SQuAD's F1: the harmonic mean of precision and recall over the words of the normalized texts."""
    said, meant = normalize(answer).split(), normalize(reference).split()
    if not said or not meant:
        return float(said == meant)
    shared = sum((Counter(said) & Counter(meant)).values())
    return 2 * shared / (len(said) + len(meant))


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return sum(collected) / len(collected)

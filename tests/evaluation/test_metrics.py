"""Metrics by hand, and against rouge-score and sacrebleu."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from jaxsloth.evaluation.metrics import EvaluationError, check_metrics, f1, normalize, text_scores

ANSWERS = ["The ducks lay sixteen eggs a day.", "Because of light!", "Nine", ""]
REFERENCES = ["ducks lay 16 eggs every day", "because of the light", "Ten", "Something"]


def test_normalization_is_squads():
    assert normalize("  The Duck's  an  egg, a day!\n") == "ducks egg day"
    assert normalize("Another theory") == "another theory"


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the duck", "a duck", 1.0),
        ("ducks lay sixteen eggs day", "ducks lay 16 eggs every day", 8 / 11),  # shared: ducks lay eggs day; 2·4 / (5 + 6)
        ("egg egg", "egg", 2 / 3),
        ("nine", "ten", 0.0),
        ("", "", 1.0),
        ("the", "ten", 0.0),
    ],
)
def test_f1_by_hand(answer, reference, expected):
    assert f1(answer, reference) == pytest.approx(expected)


def test_exact_match_and_f1_of_a_set():
    scores = text_scores(("exact_match", "f1"), ANSWERS, REFERENCES)
    assert scores == {"exact_match": 0.25, "f1": pytest.approx((8 / 11 + 1) / 4)}


def test_rouge_by_hand():
    scores = text_scores(("rouge",), ["a b c d"], ["a c b e d f"])
    # unigrams: 4 of 4 and of 6; bigrams: none of 3 and of 5; longest common subsequence: a b d (or a c d)
    assert scores == {"rouge1": pytest.approx(0.8), "rouge2": 0.0, "rougeL": pytest.approx(0.6)}


def test_rouge_score_itself():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(reference, answer) for answer, reference in zip(ANSWERS, REFERENCES, strict=True)]
    scores = text_scores(("rouge",), ANSWERS, REFERENCES)
    for name in ("rouge1", "rouge2", "rougeL"):
        assert scores[name] == pytest.approx(sum(row[name].fmeasure for row in expected) / 4)


def test_sacrebleu_itself():
    expected = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score
    assert text_scores(("bleu",), ANSWERS, REFERENCES) == {"bleu": pytest.approx(expected)}
    assert text_scores(("bleu",), REFERENCES, REFERENCES)["bleu"] == pytest.approx(100.0)
    # four words that are one reference's first four of five: every precision is 1, the brevity penalty e^(1 - 5/4)
    assert text_scores(("bleu",), ["one two three four"], ["one two three four five"])["bleu"] == pytest.approx(
        77.8801, abs=1e-4
    )


def test_names(monkeypatch):
    assert check_metrics(["bleu", " loss", "", "loss"]) == ("loss", "bleu")
    with pytest.raises(EvaluationError, match=r"must be of loss, accuracy, .* got .*meteor"):
        check_metrics(["meteor", "loss"])
    with pytest.raises(EvaluationError, match="got none"):
        check_metrics([""])
    monkeypatch.setattr("jaxsloth.extras.find_spec", lambda package: None)
    with pytest.raises(EvaluationError, match=r"needs rouge_score, sacrebleu.*pip install 'jaxsloth\[evaluate\]'"):
        check_metrics(["rouge", "bleu"])
    assert check_metrics(["loss"]) == ("loss",)

"""One rule chooses among an op's implementations and among the ways of a whole pass, and says it in one sentence."""

from __future__ import annotations

import logging
import re

import pytest

from jaxsloth.backend import BuildOptions
from jaxsloth.kernels.registry import RefusedError, choose_named, choose_written
from tests.support.small_models import VOCAB, build
from tests.support.sources import examples, first_batch, stream

REASONS = {"triton": "needs an NVIDIA GPU", "library": "knows no soft cap", "torch": None, "slow": "is never reached"}


def test_the_first_that_does_not_refuse_is_chosen_and_the_others_reasons_are_logged(caplog):
    with caplog.at_level(logging.DEBUG, "jaxsloth.kernels"):
        assert choose_named("attention", "torch", None, REASONS) == "torch"
        assert caplog.messages == [
            "op attention on torch uses torch (triton needs an NVIDIA GPU; library knows no soft cap)",
        ]
        caplog.clear()
        assert choose_named("attention", "torch", "torch", REASONS) == "torch"
        assert choose_named("attention", "torch", None, {"torch": None}) == "torch"
        assert caplog.messages == []


@pytest.mark.parametrize(
    ("requested", "reasons", "message"),
    [
        ("cuda", REASONS, "op attention has no implementation 'cuda' for torch; it has: triton, library, torch, slow"),
        ("library", REASONS, "op attention: the implementation 'library' can't run here: it knows no soft cap"),
        (None, {"a": "is shy"}, "op attention has no implementation for torch that can run: [('a', 'is shy')]"),
    ],
)
def test_what_is_refused_is_said(requested, reasons, message):
    with pytest.raises(RefusedError, match=f"^{re.escape(message)}$"):
        choose_named("attention", "torch", requested, reasons)


@pytest.mark.parametrize(
    ("requested", "reason", "platform", "written"),
    [
        (None, None, "cuda", True),
        (None, None, "cpu", False),
        (None, "draws no masks", "cuda", False),
        ("written", None, "cpu", True),
        ("fused", None, "cpu", True),
        ("autograd", None, "cuda", False),
        ("composed", "draws no masks", "cuda", False),
    ],
)
def test_a_whole_pass_is_written_on_a_gpu_or_where_it_is_asked_for(requested, reason, platform, written):
    assert choose_written("train_pass", "jax", requested, reason, platform) is written


@pytest.mark.parametrize(
    ("backend", "asked", "names"),
    [
        ("torch", "train_pass", "written, autograd"),
        ("torch", "decode_step", "fused, composed"),
        ("jax", "train_pass", "written, autograd"),
        ("jax", "layer_loop", "scan, unrolled"),
    ],
)
def test_a_way_that_a_pass_does_not_have_is_refused(backend, asked, names):
    batch = first_batch(stream(examples(4, VOCAB)))
    model, *_ = build(backend, options=BuildOptions(implementations={asked: "fast"}))
    with pytest.raises(RefusedError, match=f"^op {asked} has no implementation 'fast' for {backend}; it has: {names}$"):
        if asked == "decode_step":
            lengths = (batch.segments != 0).sum(axis=1).astype("int32")
            model.start_decode(batch.input_ids, lengths, batch.input_ids.shape[1] + 4)
        else:
            model.gradients(batch)

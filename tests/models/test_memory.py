"""The mode that "auto" takes follows from what a pass keeps, layer by layer."""

from __future__ import annotations

from jaxsloth.models.memory import activation_bytes, fitting_mode, offloaded_bytes
from jaxsloth.models.registry import spec_from_config
from jaxsloth.transforms import add_lora
from tests.support.tiny import CONFIG

SPEC = spec_from_config(CONFIG)
ORDER = ("none", "selective", "offload", "full")


def test_bytes_count_what_is_kept():
    # Width 64, four layers; a layer works with 3·128 + 2·(2·64 + 2·64 + 64) + 4·64 numbers a token.
    working = 3 * 128 + 2 * 320 + 4 * 64
    kept = {"none": 4 * (320 + 2 * 64 + 2 * 128), "selective": 4 * 320, "offload": 0, "full": 4 * 64}
    for mode, numbers in kept.items():
        assert activation_bytes(SPEC, mode, 10, 2) == 10 * 2 * (numbers + working)
    assert activation_bytes(SPEC, "full", 10, 2, attends_once=True) == 10 * 2 * (4 * (2 * 64 + 64) + working)
    adapted = add_lora(SPEC, r=32, alpha=16.0)
    for mode in kept:  # seven products with A a layer, 32 wide
        assert activation_bytes(adapted, mode, 10, 2) - activation_bytes(SPEC, mode, 10, 2) == 10 * 2 * 4 * 7 * 32
    assert offloaded_bytes(SPEC, 10, 2) == activation_bytes(SPEC, "selective", 10, 2) - 10 * 2 * working


def test_the_fastest_that_fits_is_taken():
    needs = [activation_bytes(SPEC, mode, 1000, 2) for mode in ORDER]
    for mode, need in zip(ORDER[:3], needs, strict=False):
        assert fitting_mode(SPEC, ORDER, 1000, 2, need / 0.9 + 1) == mode
    assert fitting_mode(SPEC, ORDER, 1000, 2, 0) == "full"

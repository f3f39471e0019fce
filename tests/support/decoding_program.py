"""What a small NF4 model answers on JAX, by both ways of decoding; prints it as JSON when run as a program."""

from __future__ import annotations

import json

from jaxsloth.backend import load_backend
from jaxsloth.generation import generate
from jaxsloth.models.registry import spec_from_config
from jaxsloth.transforms import quantize
from tests.support.decoding import PROMPTS, SETTINGS, adapted, build
from tests.support.tiny import CONFIG


def answers() -> dict[str, list[list[int]]]:
    found = {}
    for name in ("fused", "composed"):
        model = build("jax", quantize(spec_from_config(CONFIG), nested=True), name)
        model.add_adapters(*adapted(model))
        found[name] = generate(model, PROMPTS, SETTINGS)
    return found


if __name__ == "__main__":
    print(json.dumps({"devices": load_backend("jax").devices().count, "answers": answers()}))

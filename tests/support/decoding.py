"""Small models that decode: their prompts, the kinds of layers they have, and how they are built on either backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jaxsloth.backend import BuildOptions, load_backend
from jaxsloth.generation import GenerationSettings
from jaxsloth.models.names import tensor_shapes
from jaxsloth.models.spec import Block, Norm, Rope
from jaxsloth.training.initialize import initial_adapters
from jaxsloth.transforms import add_lora, quantize
from tests.support.sources import DictSource

PROMPTS = [[5, 9, 77, 30], [200, 3, 4, 8, 15, 16, 23, 42, 99], [7]]
SETTINGS = GenerationSettings(max_new_tokens=12, eos_ids=())
NORM = Norm(eps=1e-5)


def of_layers(spec, attention):
    """The spec with fields of every layer's attention replaced; attention: a function of the layer's index."""
    layers = tuple(
        block.with_bodies(self_attn=replace(block.attention, **attention(index))) for index, block in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def of_blocks(spec, change):
    """The spec with every block changed."""
    return replace(spec, layers=tuple(change(block) for block in spec.layers))


def sandwich(block):
    return Block.sandwich(block.attention, block.mlp, block.branches[0].norm)


def two_ropes(index):
    return {"rope": Rope(10000.0, 16), "window": 5} if index % 2 else {"rope": Rope(500.0, 16)}


def no_rope(index):
    return {"rope": None} if index % 2 else {}


VARIANTS = {
    "dense": lambda spec: spec,
    "nf4": lambda spec: quantize(spec, nested=False),
    "nested": lambda spec: quantize(spec, nested=True),
    "qk_norm": lambda spec: of_layers(spec, lambda _: {"qk_norm": NORM}),
    "windows": lambda spec: of_layers(spec, lambda index: {"window": 5 if index % 2 else None, "soft_cap": 2.0}),
    "no_rope": lambda spec: of_layers(spec, no_rope),
    "two_ropes": lambda spec: of_layers(spec, two_ropes),
    "sandwich": lambda spec: replace(
        of_blocks(spec, sandwich),
        embedding=replace(spec.embedding, scale=8.0),
        head=replace(spec.head, soft_cap=3.0),
    ),
    "unnormed": lambda spec: of_blocks(
        spec, lambda block: Block.pre_norm(block.attention, block.mlp, None, block.branches[1].norm)
    ),
    "gemma_norm": lambda spec: of_blocks(
        spec,
        lambda block: Block.pre_norm(block.attention, block.mlp, block.branches[0].norm, replace(NORM, weight_offset=1.0)),
    ),
}


def random_tensors(spec, seed=4):
    generator = np.random.Generator(np.random.Philox(seed))
    return {
        name: generator.normal(float(len(shape) == 1), 0.1 if len(shape) == 1 else 2 * shape[-1] ** -0.5, shape).astype(
            np.float32
        )
        for name, shape in tensor_shapes(spec).items()
    }


def build(backend, spec, name, tensors=None, dtype="float32", **implementations):
    """A model whose greedy bursts run as the decoding program `name`."""
    options = BuildOptions(dtype=dtype, implementations={"decode_step": name, **implementations})
    return load_backend(backend).build(spec, DictSource(tensors or random_tensors(spec)), options)


def adapted(model, seed=5):
    spec = add_lora(model.spec, r=4, alpha=8.0, targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    values = initial_adapters(spec, "kaiming", seed, model.base_tensor)
    generator = np.random.Generator(np.random.Philox(seed))
    return spec, {n: generator.normal(0, 0.2, v.shape).astype(np.float32) if "lora_B" in n else v for n, v in values.items()}


def padded():
    ids = np.zeros((3, 9), np.int32)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[-len(prompt) :] = prompt
    return ids, np.array([len(prompt) for prompt in PROMPTS], np.int32)

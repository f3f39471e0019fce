"""Rotary frequencies, with the ways in which they are stretched past the trained context.

Both backends use these numbers. They are rounded to float32 where transformers rounds: an angle is position × frequency, so the
last bit of a frequency moves the angle at position 1000 by 6e-5, which would be most of the distance to transformers' logits.
"""

from __future__ import annotations

import math
import struct

from jaxsloth.models.spec import Rope, RopeScaling


def inverse_frequencies(rope: Rope, *, max_positions: int, length: int | None = None) -> tuple[tuple[float, ...], float]:
    """The rotation of each channel pair a position, and the factor that cos and sin are multiplied by.

    Args:
        max_positions: the model's context (`ModelSpec.max_positions`).
        length: the longest sequence at hand; only "dynamic" and "longrope" look at it. None: within the trained context.

    Returns:
        (rotary_dim / 2 frequencies in radians a position, attention scaling).

    Sources: linear: Chen et al. 2023, arXiv:2306.15595. dynamic: NTK-aware scaling (bloc97, 2023), base grown with the length.
    llama3: the Llama 3.1 release. yarn: Peng et al. 2023, arXiv:2309.00071, §3. longrope: Ding et al. 2024, arXiv:2402.13753.
    """
    scaling, dim = rope.scaling, rope.rotary_dim
    theta = rope.theta
    if scaling is not None and scaling.kind == "dynamic":
        seen = max(length or max_positions, max_positions)
        theta *= (scaling.factor * seen / max_positions - (scaling.factor - 1.0)) ** (dim / (dim - 2))
    plain = tuple(_float32(1.0 / _float32(theta ** _float32(channel / dim))) for channel in range(0, dim, 2))
    if scaling is None or scaling.kind == "dynamic":
        return plain, 1.0
    if scaling.kind == "linear":
        return tuple(_float32(f / scaling.factor) for f in plain), 1.0
    if scaling.kind == "llama3":
        return tuple(_llama3(f, scaling, max_positions) for f in plain), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, rope, scaling, max_positions)
    return _longrope(plain, scaling, max_positions, length)


def _float32(value: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _llama3(frequency: float, scaling: RopeScaling, max_positions: int) -> float:
    """Long waves are divided by the factor, short ones kept, and those between blended by their place in the band."""
    trained = scaling.original_max_positions or max_positions
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    turns = trained * frequency / (2 * math.pi)  # within the trained context
    if turns < low:
        return frequency / scaling.factor
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def _yarn(plain: tuple[float, ...], rope: Rope, scaling: RopeScaling, max_positions: int) -> tuple[tuple[float, ...], float]:
    trained = scaling.original_max_positions or max_positions
    dim = rope.rotary_dim

    def channel_of(turns: float) -> float:
        """The channel pair that makes `turns` rotations within the trained context."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = channel_of(scaling.beta_fast or 32.0), channel_of(scaling.beta_slow or 1.0)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001  # no division by zero where the band is empty
    frequencies = []
    for pair, frequency in enumerate(plain):
        interpolated = min(max((pair - first) / width, 0.0), 1.0)
        frequencies.append(interpolated * frequency / scaling.factor + (1 - interpolated) * frequency)
    return tuple(frequencies), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _longrope(
    plain: tuple[float, ...], scaling: RopeScaling, max_positions: int, length: int | None
) -> tuple[tuple[float, ...], float]:
    trained = scaling.original_max_positions or max_positions
    chosen = scaling.long_factor if length is not None and length > trained else scaling.short_factor
    if chosen is None:
        raise ValueError("longrope scaling needs short_factor and long_factor, one number a channel pair")
    factor = scaling.attention_factor
    if factor is None:
        factor = 1.0 if scaling.factor <= 1.0 else math.sqrt(1 + math.log(scaling.factor) / math.log(trained))
    return tuple(f / c for f, c in zip(plain, chosen, strict=True)), factor

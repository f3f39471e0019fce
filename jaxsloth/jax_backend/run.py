"""What every body of one pass is given beside its input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from jaxsloth.models.spec import Rope


@partial(jax.tree_util.register_dataclass, data_fields=["rng_key", "rows"], meta_fields=[])
@dataclass(frozen=True)
class DropoutKey:
    """The key of a step's dropout masks: rng_key uint32 ``[2]``, rows int32 ``[batch]``, the rows' global numbers."""

    rng_key: Any
    rows: Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tables", "segments", "kv_segments", "used", "dropout", "layer", "documents"],
    meta_fields=["ropes", "decoding", "unpacked", "stream_pad"],
)
@dataclass(frozen=True)
class Run:
    """The arrays and the settings that all blocks of a pass share.

    tables: (cos, sin) of each setting in `ropes`. segments: int32 ``[batch, length]``, kv_segments likewise for the keys where
    they differ (the cache's slots, of which `used` are written). dropout: None outside training. decoding: one token a row, and
    no gradient is wanted. layer: the index of the block in its stack.

    Of the written pass only: documents, those of a packed batch; unpacked: every row is one document, perhaps with padding
    behind it; stream_pad: columns behind the rows of the stream's gradient.
    """

    ropes: tuple[Rope, ...]
    tables: tuple[tuple[Any, Any], ...]
    segments: Any
    kv_segments: Any = None
    used: Any = None
    dropout: DropoutKey | None = None
    decoding: bool = False
    layer: Any = None
    documents: Any = None
    unpacked: bool = False
    stream_pad: int = 0

    def at(self, layer: Any) -> Run:
        """The same for the blocks at index `layer` of their stacks."""
        return replace(self, layer=layer)

    def tables_of(self, rope: Rope | None) -> Any:
        """(cos, sin) of a rotary setting; None where nothing is turned."""
        return None if rope is None else self.tables[self.ropes.index(rope)]

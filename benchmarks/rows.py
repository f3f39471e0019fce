"""The rows of the table that the targets are stated in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.contenders import DEFAULT, Entry
from benchmarks.work import Work


@dataclass(frozen=True)
class Row:
    """One kind of work for all contenders. recompute: whether the mode asked for is the lowest-memory one, whose counted FLOPs
    hold each layer's forward twice, or the one that keeps everything."""

    name: str
    work: Work
    recompute: bool = False
    contenders: str = DEFAULT

    def work_of(self, entry: Entry) -> Work:
        return self.work.of(entry.checkpointing or entry.contender.checkpointing[int(self.recompute)], entry.options)

    def title(self) -> str:
        mode = "lowest memory" if self.recompute else "no recompute"
        return f"{self.name}: {self.work.shape}, {self.work.quantization}, {self.work.batch}×{self.work.length}, {mode}"


def _row(
    name: str,
    shape: str,
    batch: int,
    length: int,
    recompute: bool,
    quantization: Literal["nf4", "none"] = "nf4",
    further: str = "",
    warmup: int = 3,
) -> Row:
    work = Work(shape=shape, batch=batch, length=length, quantization=quantization, warmup=warmup)
    return Row(name, work, recompute, ",".join([DEFAULT, further] if further else [DEFAULT]))


ROWS = {
    row.name: row
    for row in (
        _row("8b-recompute", "8b", 4, 2048, True),
        _row("8b-fast", "8b", 4, 2048, False, further="jaxsloth-torch:none:compute=fp8,floor"),
        _row("8b-bf16", "8b", 4, 2048, True, "none"),
        _row("1b", "1b", 2, 512, False),
        _row("8b-32k", "8b", 1, 32768, True, warmup=2),
    )
}

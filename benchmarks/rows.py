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
    floor: bool = True,
) -> Row:
    work = Work(shape=shape, batch=batch, length=length, quantization=quantization)
    return Row(name, work, recompute, f"{DEFAULT},floor" if floor else DEFAULT)


ROWS = {
    row.name: row
    for row in (
        _row("8b-recompute", "8b", 4, 2048, True),
        _row("8b-fast", "8b", 4, 2048, False),
        Row("8b-fp8", Work(shape="8b", batch=4, length=2048), False, "jaxsloth-torch:none:compute=fp8,jaxsloth-torch,unsloth"),
        _row("8b-bf16", "8b", 4, 2048, True, "none", floor=False),
        _row("1b", "1b", 2, 512, False, floor=False),
        _row("8b-32k", "8b", 1, 32768, True, floor=False),
    )
}

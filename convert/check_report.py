"""What a check shows: its table, its misses, its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxsloth.convert.check import PROMPTS, Checked, check, check_possible, prompts_of
from jaxsloth.convert.check_adapters import check_adapter, check_adapter_possible, is_adapter
from jaxsloth.convert.gguf_adapter import is_gguf_adapter
from jaxsloth.convert.run import ADAPTERS, Plan

# The kind of checkpoint that a format is, where it has another name.
_KINDS = {"hf": "safetensors", "maxtext": "orbax", "tunix": "orbax"}


def prepared(prompts: Path | None, plan: Plan | None = None, source: str = "") -> tuple[str, ...]:
    """The prompts, and that what a plan makes of `source` can be checked: packages and a tokenizer, before the first byte is
    written."""
    found = PROMPTS if prompts is None else prompts_of(prompts)
    if plan is not None and plan.to in ADAPTERS:
        check_adapter_possible(plan.to, "gguf-lora" if is_gguf_adapter(Path(source)) else "peft")
    elif plan is not None:
        check_possible(plan.checkpoint, _KINDS.get(plan.to, plan.to), plan.options.merge)
    return found


def checks_out(
    source: str,
    destination: Path,
    merge: Path | None,
    prompts: Sequence[str],
    console: Console,
    *,
    base: str | None = None,
    written: bool = False,
) -> bool:
    """Checks, shows what was found, and says whether every bar was met.

    Args:
        base: where both are adapters, the model that they belong to. written: a conversion just wrote the destination.
    """

    def tell(line: str) -> None:
        console.print(escape(line))

    try:
        if is_adapter(source):
            found = check_adapter(source, str(destination), base=base, prompts=prompts, tell=tell)
        else:
            found = check(source, str(destination), merge=merge, prompts=prompts, tell=tell)
    except Exception:
        if written:
            console.print(f"{escape(str(destination))} is written, and stays; its check did not come to an end")
        raise
    show_checked(found, console)
    if found.misses and written:
        console.print(f"{escape(str(destination))} stays as it was written")
    return not found.misses


def show_checked(found: Checked, console: Console) -> None:
    table = Table("", "found", f"bar ({found.stored_as})")
    table.add_row("mean KL, nats", f"{found.mean_kl:.3g}", f"<= {found.bar.mean_kl:g}")
    table.add_row("largest KL, nats", f"{found.largest_kl:.3g}", f"<= {found.bar.largest_kl:g}")
    table.add_row("likeliest token agrees", f"{found.top1:.1%} of {found.tokens}", f">= {found.bar.top1:.0%}")
    table.add_row("texts with the same token ids", f"{found.texts - len(found.differing)} of {found.texts}", "all")
    if found.moved is not None:
        table.add_row("KL base to base + adapter", f"{found.moved.by_adapter:.3g}", "")
        table.add_row("KL base to merged", f"{found.moved.by_merge:.3g}", "")
        table.add_row("share of the adapter's movement", f"{found.moved.share:.3f}", "0.5 to 1.5")
    console.print(f"{found.readers[0]} and {found.readers[1]}:")
    console.print(table)
    for note in found.notes:
        console.print(f"note: {escape(note)}")
    for text, want, got in found.differing:
        console.print(f"token ids differ: {escape(repr(text))}: {want} and {got}", markup=False)
    for miss in found.misses:
        console.print(f"missed: {miss}", markup=False)
    console.print("verdict: missed" if found.misses else "verdict: held")

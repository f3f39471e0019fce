"""The loss plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxsloth.convert.files import TEMPORARY_PREFIX

Curve = tuple[Sequence[int], Sequence[float]]


def plot_losses(curves: Mapping[str, Curve], path: Path, title: str, points: Mapping[str, Curve] | None = None) -> None:
    """Draws loss against optimizer step as a PNG.

    Args:
        curves: label -> (steps, losses), each a line; later ones are dashed, so that equal curves stay visible.
        points: label -> (steps, losses), each drawn as marks on a line (evaluations).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (label, (steps, losses)) in enumerate(curves.items()):
        style = "-" if place == 0 else (0, (4, 3))
        axes.plot(steps, losses, label=label, linestyle=style, linewidth=3.2 - 1.4 * min(place, 1), alpha=0.9)
    for label, (steps, losses) in (points or {}).items():
        axes.plot(steps, losses, label=label, marker="o", linewidth=1.2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)

"""Plots of the quality benchmark.

python -m benchmarks.quality.plots       # docs/images/quality/*.png
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.quality.methods import METHODS
from benchmarks.quality.records import FOLDER, Records
from benchmarks.quality.subjects import SUBJECTS
from benchmarks.quality.sweep import final_runs, mean_loss, sweep_runs

IMAGES: Final = Path(__file__).parents[2] / "docs" / "images" / "quality"
# Okabe and Ito's palette, told apart with any colour vision.
COLOURS: Final = {
    "adamw": "#000000",
    "lora_plus": "#56B4E9",
    "riemannian": "#009E73",
    "dora": "#CC79A7",
    "adalora": "#999999",
    "ekfac": "#D55E00",
    "reproject": "#0072B2",
    "budget": "#E69F00",
}
"""The methods that are drawn; the tables have all."""

BANDS: Final = ("adamw", "reproject")
"""Drawn with the range of their seeds; more bands would hide one another."""


def learning_curves(axes: Axes, records: Records) -> None:
    """Median evaluation loss by step, for some with the range of the seeds."""
    for method, colour in COLOURS.items():
        runs = final_runs(records, method)
        if not runs:
            continue
        steps = np.array([p["step"] for p in runs[0]["points"]]) + runs[0]["extra_passes"]
        losses = np.array([[p["loss"] for p in run["points"]] for run in runs])
        low, middle, high = np.quantile(losses, [0.0, 0.5, 1.0], axis=0)
        axes.plot(steps[1:], middle[1:], color=colour, lw=1.6, label=METHODS[method].title)
        if method in BANDS:
            axes.fill_between(steps[1:], low[1:], high[1:], color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="optimizer steps", ylabel="evaluation loss", yscale="log")


def rate_robustness(axes: Axes, records: Records) -> None:
    """Final loss by learning rate, relative to each method's best rate."""
    for method, colour in COLOURS.items():
        _, best = sweep_runs(records, method)
        if best is None:
            continue
        rates = sorted({run["rate"] for run in records.of_method(method, final=False)})
        losses = [mean_loss(records, method, rate) for rate in rates]
        axes.plot(
            [rate / best for rate in rates],
            losses,
            color=colour,
            lw=1.4,
            marker="o",
            ms=3,
            label=METHODS[method].title,
        )
    axes.set(
        xlabel="learning rate, best = 1", ylabel="final selection loss", xscale="log", yscale="log"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_minor_locator(NullLocator())


def retention_frontier(axes: Axes, records: Records) -> None:
    """Loss on the old task against loss on the new one, along the median curve."""
    for method, colour in COLOURS.items():
        runs = final_runs(records, method)
        if not runs:
            continue
        new, old = (
            [statistics.median(values) for values in _columns(runs, name)][1:]
            for name in ("loss", "retention")
        )
        axes.plot(new, old, color=colour, lw=1.2, marker="o", ms=2.5, label=METHODS[method].title)
    axes.set(xlabel="new-task loss", ylabel="old-task loss", xscale="log", yscale="log")
    axes.invert_xaxis()


def _columns(runs: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, ...]]:
    return list(zip(*([p[name] for p in run["points"]] for run in runs), strict=True))


def rank_by_layer(axes: Axes, records: Records, method: str) -> None:
    """Effective rank and active directions of every layer at the end, one seed."""
    runs = final_runs(records, method)
    if not runs or not runs[0]["layers"]:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes)
        return
    layers = runs[0]["layers"]
    places = np.arange(len(layers))
    axes.bar(
        places, [x["active"] for x in layers.values()], color="#D9D9D9", label="active directions"
    )
    axes.plot(
        places,
        [x["effective_rank"] for x in layers.values()],
        "o",
        ms=3.5,
        color=COLOURS["ekfac"],
        label="effective rank",
    )
    axes.set_xticks(places, [_short(name) for name in layers], rotation=90, fontsize=6)
    axes.set(ylabel="directions")
    axes.legend(frameon=False, fontsize=7, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.grid(visible=False, axis="x")


def _short(name: str) -> str:
    """Such as vision 0 q for model.vision_model.encoder.layers.0.self_attn.q_proj."""
    parts = name.split(".")
    tower = "vision" if "vision" in name else "connector" if "connector" in name else "text"
    block = next((part for part in parts if part.isdigit()), "")
    return f"{tower} {block} {parts[-1].removesuffix('_proj')}".replace("  ", " ")


def main() -> None:
    """Draw what the records allow."""
    mpl.use("Agg")
    plt.rcParams.update({
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "figure.dpi": 150,
    })
    IMAGES.mkdir(parents=True, exist_ok=True)
    names = [name for name in SUBJECTS if (FOLDER / f"{name}.jsonl").exists()]
    for file, draw in (
        ("learning-curves", learning_curves),
        ("learning-rates", rate_robustness),
        ("retention", retention_frontier),
    ):
        figure, grid = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), squeeze=False)
        for axes, name in zip(grid[0], names, strict=True):
            draw(axes, Records.of(name))
            axes.set_title(name)
            _plain_ticks(axes)
        _save(figure, grid[0], file)
    _draw_ranks(names)


def _draw_ranks(names: Sequence[str]) -> None:
    figure, grid = plt.subplots(len(names), 2, figsize=(9, 2.6 * len(names)), squeeze=False)
    for row, name in zip(grid, names, strict=True):
        for axes, method in zip(row, ("ekfac", "budget"), strict=True):
            rank_by_layer(axes, Records.of(name), method)
            axes.set_title(f"{name}: {METHODS[method].title}", pad=18)
    figure.tight_layout()
    figure.savefig(IMAGES / "rank-by-layer.png")
    plt.close(figure)


def _plain_ticks(axes: Axes) -> None:
    """Write 0.3 and not 3 x 10^-1."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        if axis.get_scale() == "log":
            axis.set_minor_formatter(plain)
            axis.set_tick_params(which="minor", labelsize=6)


def _save(figure: Any, grid: Sequence[Axes], name: str) -> None:
    """One legend below all panels, the reference first."""
    fullest = max(grid, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    handles, labels = fullest.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncol=math.ceil(len(labels) / 2), frameon=False
    )
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(IMAGES / f"{name}.png")
    plt.close(figure)


if __name__ == "__main__":
    main()

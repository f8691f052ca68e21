"""Plots of the serving benchmark.

python -m benchmarks.serving.plots       # docs/images/serving/*.png
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.measure import RESULTS
from benchmarks.serving.deployment import API, INFERENCE

IMAGES: Final = Path(__file__).parents[2] / "docs" / "images" / "serving"
# Okabe and Ito's palette, told apart with any colour vision.
OURS, OTHER, THIRD, FOURTH, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#777777"
ARMS: Final = {
    "ours": ("this engine, an adapter for each row", OURS),
    "merged": ("this engine, one merged adapter", "#000000"),
    "merged_transformers": ("transformers, one merged adapter", GREY),
    "peft_mixed": ("PEFT adapter_names", OTHER),
    "peft_in_turn": ("PEFT, one after another", THIRD),
}

Result = Mapping[str, Any]


def tokens_by_adapters(axes: Axes, result: Result) -> None:
    """Tokens a second against the number of adapters in the batch."""
    counts = [point["num_adapters"] for point in result["curve"]]
    for name, (title, colour) in ARMS.items():
        rates = [point["tokens_per_second"][name] for point in result["curve"]]
        axes.plot(counts, rates, "o-", color=colour, ms=4, lw=1.6, label=title)
    axes.set(
        xlabel="adapters in the batch, one row each",
        ylabel="tokens a second, decoding",
        xscale="log",
    )
    axes.set_ylim(bottom=0)
    _ticks(axes, counts)
    axes.legend(frameon=False)


def throughput(axes: Axes, result: Result) -> None:
    """What was answered and what was turned away, against what was offered."""
    levels = result["levels"]
    offered = [level["offered_per_second"] for level in levels]
    answered = [level["answers_per_second"] for level in levels]
    shed = [level["shed_share"] * level["offered_per_second"] for level in levels]
    axes.plot(offered, offered, ":", color=GREY, lw=1, label="all of it")
    axes.plot(offered, answered, "o-", color=OURS, ms=4, lw=1.6, label="answered")
    axes.plot(offered, shed, "s-", color=OTHER, ms=4, lw=1.6, label="turned away with 429")
    axes.axvline(result["capacity"]["answers_per_second"], color=GREY, lw=0.8, ls="--")
    axes.set(xlabel="requests a second, offered", ylabel="requests a second")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def latency(axes: Axes, result: Result) -> None:
    """Median and 99th percentile against what was offered."""
    levels = result["levels"]
    offered = [level["offered_per_second"] for level in levels]
    for name, title, colour in (
        ("latency", "whole answer", OURS),
        ("first_token", "first token", OTHER),
    ):
        for quantile, style in (("p50", "o-"), ("p99", "o--")):
            seconds = [level[f"{name}_{quantile}_seconds"] for level in levels]
            axes.plot(
                offered, seconds, style, color=colour, ms=4, lw=1.4, label=f"{title}, {quantile}"
            )
    axes.axvline(result["capacity"]["answers_per_second"], color=GREY, lw=0.8, ls="--")
    axes.set(xlabel="requests a second, offered", ylabel="seconds", yscale="log")
    axes.yaxis.set_major_formatter(_plain())
    axes.legend(frameon=False)


def memory_by_adapters(axes: Axes, result: Result) -> None:
    """Resident memory against the number of registered adapters."""
    counts = [level["num_registered"] for level in result["levels"]]
    for name, title, colour in ((INFERENCE, "inference worker", OURS), (API, "API", OTHER)):
        held = [level[f"{name}_resident_bytes"] / 1e6 for level in result["levels"]]
        axes.plot(counts, held, "o-", color=colour, ms=4, lw=1.6, label=title)
    axes.set(xlabel="registered adapters", ylabel="resident memory, MB", xscale="log")
    axes.set_ylim(bottom=0)
    _ticks(axes, counts)
    axes.legend(frameon=False)


def latency_by_adapters(axes: Axes, result: Result) -> None:
    """Latency of a request against the number of registered adapters."""
    counts = [level["num_registered"] for level in result["levels"]]
    for name, title, colour in (
        ("p50_seconds", "median", OURS),
        ("mean_seconds", "mean", FOURTH),
        ("p99_seconds", "p99", OTHER),
    ):
        spent = [level[name] * 1e3 for level in result["levels"]]
        axes.plot(counts, spent, "o-", color=colour, ms=4, lw=1.6, label=title)
    axes.set(xlabel="registered adapters", ylabel="milliseconds a request", xscale="log")
    axes.set_ylim(bottom=0)
    _ticks(axes, counts)
    axes.legend(frameon=False)


def memory_over_time(axes: Axes, result: Result) -> None:
    """What the worker and the API held during the soak; a line at each kill."""
    for name, title, colour in ((INFERENCE, "inference worker", OURS), (API, "API", OTHER)):
        samples = [s for s in result["samples"] if s["name"] == name]
        minutes = [s["at_seconds"] / 60 for s in samples]
        held = [s["resident_bytes"] / 1e6 for s in samples]
        axes.plot(minutes, held, ".", color=colour, ms=2.5, label=title)
    for number, kill in enumerate(result["kills"]):
        label = "worker killed" if number == 0 else None
        axes.axvline(kill["at_seconds"] / 60, color=GREY, lw=0.6, ls=":", label=label)
    axes.set(xlabel="minutes", ylabel="resident memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")


Drawing = Callable[[Axes, Result], None]
FIGURES: Final[Mapping[str, tuple[str, tuple[Drawing, ...]]]] = {
    "adapters-in-batch": ("mixed", (tokens_by_adapters,)),
    "load": ("load", (throughput, latency)),
    "registered-adapters": ("memory", (memory_by_adapters, latency_by_adapters)),
    "soak": ("soak", (memory_over_time,)),
}
"""By file name: the result that it shows, and its panels."""


def _ticks(axes: Axes, values: list[int]) -> None:
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _plain() -> FuncFormatter:
    """Write 0.3 and not 3 x 10^-1."""
    return FuncFormatter(lambda value, _: f"{value:g}")


def draw(results: Path, images: Path) -> list[Path]:
    """Draw every figure whose result is there."""
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
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (source, panels) in FIGURES.items():
        path = results / f"{source}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        width = 4.2 * len(panels) if len(panels) > 1 else 5.4
        figure, grid = plt.subplots(1, len(panels), figsize=(width, 3.2), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            panel(axes, result)
        figure.tight_layout()
        figure.savefig(images / f"{name}.png")
        plt.close(figure)
        drawn.append(images / f"{name}.png")
    return drawn


def main() -> None:
    """Draw what the results allow."""
    for path in draw(RESULTS / "serving", IMAGES):
        print(path)


if __name__ == "__main__":
    main()

"""Plots of the load benchmark.

python -m benchmarks.load.plots       # docs/images/load/*.png
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.measure import RESULTS

IMAGES: Final = Path(__file__).parents[2] / "docs" / "images" / "load"
# Okabe and Ito's palette, told apart with any colour vision.
COLOURS: Final = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BOUNDS: Final = {"A1": (0.25, 0.40), "A2": (0.30, 0.50), "A3": (0.25, 0.45)}
TITLES: Final = {"A1": "GET, no database", "A2": "GET /jobs/{id}", "A3": "POST /jobs"}
SHOWN: Final = (
    "GET /jobs/{id}",
    "list",
    "list, status=succeeded",
    "list, from the middle",
    "claim_next",
    "queues_to_ring",
    "quota of open jobs",
)

Result = Mapping[str, Any]


def ratio_bars(axes: Axes, result: Result) -> None:
    """Ratios to the hand-written peers, with their intervals and what they are held to."""
    for place, name in enumerate(TITLES):
        found = result[name]["ratio"]
        middle = found["median_ratio"]
        error = [[middle - found["low"]], [found["high"] - middle]]
        axes.barh(place, middle, xerr=error, color=COLOURS[place], height=0.55, capsize=3)
        for bound, style in zip(BOUNDS[name], ("-", ":"), strict=True):
            axes.plot([bound, bound], [place - 0.4, place + 0.4], style, color="black", lw=1.2)
    labels = [
        f"{title}\n{result[name]['ratio']['median_ratio']:.2f}" for name, title in TITLES.items()
    ]
    axes.set_yticks(range(len(TITLES)), labels)
    axes.set(xlabel="answers a second / hand-written (line: must, dots: goal)")
    axes.set_xlim(left=0)


def slope_lines(axes: Axes, result: Result) -> None:
    """What looks cost against the number of jobs."""
    for name, colour in zip(SHOWN, COLOURS, strict=True):
        seconds = result["looks"][name]["seconds"]
        sizes = [int(size) for size in seconds]
        title = f"{name} ({result['looks'][name]['slope']:+.2f})"
        axes.plot(
            sizes, [1e3 * each for each in seconds.values()], "o-", color=colour, ms=4, label=title
        )
    axes.set(xscale="log", yscale="log", xlabel="jobs in the table", ylabel="ms, median")
    axes.legend(
        frameon=False,
        fontsize=7,
        title="slope in brackets",
        title_fontsize=7,
        bbox_to_anchor=(1.0, 1.0),
    )


PLOTS: Final = {"ratios": ratio_bars, "slopes": slope_lines}


def main() -> None:
    """Draw what was measured."""
    mpl.use("Agg")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        source = RESULTS / "load" / f"{name}.json"
        if not source.exists():
            continue
        figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
        draw(axes, json.loads(source.read_text()))
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(IMAGES / f"{name}.png", dpi=140)
        plt.close(figure)


if __name__ == "__main__":
    main()

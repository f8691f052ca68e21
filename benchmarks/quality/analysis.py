"""What the records say: steps to the targets, final losses, forgetting, and robustness.

python -m benchmarks.quality.analysis     # summary.json and the tables of docs/benchmarks.md
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.quality.methods import METHODS
from benchmarks.quality.records import FOLDER, Records
from benchmarks.quality.sweep import final_runs, mean_loss

REFERENCE: Final = "adamw"
NEAR: Final = 0.05
"""A learning rate is near the best when its loss is within this share of it."""

DOCS: Final = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN: Final = "<!-- quality:begin -->"
END: Final = "<!-- quality:end -->"

Point = Mapping[str, float]


def crossing(points: Sequence[Point], target: float, *, extra_steps: int = 0) -> dict[str, float]:
    """Where a curve first reaches a loss: the step and what was retained, between points linearly.

    Args:
        points: With `step`, `loss` and `retention`, by step.
        target: The evaluation loss to reach.
        extra_steps: Backward passes before the first step; they count.

    Returns:
        `step` and `retention`; infinite and NaN where the target is never reached.
    """
    before = points[0]
    for point in points:
        if point["loss"] <= target:
            span = before["loss"] - point["loss"]
            share = 1.0 if span <= 0 else (before["loss"] - target) / span
            return {
                name: before[name]
                + share * (point[name] - before[name])
                + (extra_steps if name == "step" else 0)
                for name in ("step", "retention")
            }
        before = point
    return {"step": math.inf, "retention": math.nan}


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median of ours / theirs by seed, with a 95 % bootstrap interval over seeds.

    Where both never arrive a seed says nothing; where one does not, the ratio is infinite or zero.
    """
    pairs = [
        (a, b) for a, b in zip(ours, theirs, strict=True) if math.isfinite(a) or math.isfinite(b)
    ]
    if not pairs:
        return {"median": math.nan, "low": math.nan, "high": math.nan}
    ratios = np.array([
        math.inf if math.isinf(a) else 0.0 if math.isinf(b) else a / b for a, b in pairs
    ])
    random = np.random.default_rng(0)
    medians = np.sort(np.median(random.choice(ratios, (4_000, len(ratios))), axis=1))
    return {
        "median": float(np.median(ratios)),
        "low": float(medians[int(0.025 * len(medians))]),
        "high": float(medians[int(0.975 * len(medians))]),
    }


def summarise(subject: str, targets: Sequence[float]) -> dict[str, Any]:
    """Say everything of one subject, by method; methods without final runs are left out."""
    records = Records.of(subject)
    finals = {method: final_runs(records, method) for method in METHODS}
    return {
        "targets": list(targets),
        "methods": {
            method: _of_method(records, method, runs, finals[REFERENCE], targets)
            for method, runs in finals.items()
            if runs and finals[REFERENCE]
        },
    }


def _of_method(
    records: Records,
    method: str,
    runs: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    targets: Sequence[float],
) -> dict[str, Any]:
    losses = [run["loss"] for run in runs]
    swept = sorted({run["rate"] for run in records.of_method(method, final=False)})
    by_rate = {rate: mean_loss(records, method, rate) for rate in swept}
    lowest = min(by_rate.values())
    return {
        "title": METHODS[method].title,
        "rate": runs[0]["rate"],
        "rates": by_rate,
        "near_best": sum(loss <= lowest * (1 + NEAR) for loss in by_rate.values()),
        "final_loss": statistics.median(losses),
        "final_low": float(np.quantile(losses, 0.25)),
        "final_high": float(np.quantile(losses, 0.75)),
        "final_ratio": paired_ratio(losses, [run["loss"] for run in reference]),
        "parameters": runs[0]["parameters"],
        "failures": sum(
            run["failure"] is not None for run in records.of_method(method, final=False)
        ),
        "targets": [_to_target(runs, reference, target) for target in targets],
        "final_retention": statistics.median(run["points"][-1]["retention"] for run in runs),
    }


def _to_target(
    runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], target: float
) -> dict[str, Any]:
    found, other = (
        [crossing(run["points"], target, extra_steps=run["extra_passes"]) for run in each]
        for each in (runs, reference)
    )
    retained = [at["retention"] for at in found if math.isfinite(at["step"])]
    return {
        "loss": target,
        "steps": [at["step"] for at in found],
        "median_steps": statistics.median(at["step"] for at in found),
        "reached": len(retained),
        "ratio": paired_ratio([at["step"] for at in found], [at["step"] for at in other]),
        "retention": statistics.median(retained) if retained else math.nan,
    }


def table(summary: Mapping[str, Any]) -> str:
    """A subject's table in Markdown."""
    targets = summary["targets"]
    heads = ["method", "rate", "final loss (quartiles)", "to AdamW's"]
    heads += [f"steps to {target:g}" for target in targets]
    heads += [f"old-task loss there ({targets[-1]:g})", "rates near best", "parameters"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for method in summary["methods"].values():
        cells = [
            method["title"],
            f"{method['rate']:g}",
            f"{method['final_loss']:.3f} ({method['final_low']:.3f} to {method['final_high']:.3f})",
            _ratio(method["final_ratio"]),
            *(_steps(target) for target in method["targets"]),
            _number(method["targets"][-1]["retention"]),
            f"{method['near_best']} of {len(method['rates'])}",
            f"{method['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps(target: Mapping[str, Any]) -> str:
    if not math.isfinite(target["median_steps"]):
        return f"never ({target['reached']} of {len(target['steps'])} seeds)"
    return f"{target['median_steps']:.0f}, {_ratio(target['ratio'])}"


def _ratio(ratio: Mapping[str, float]) -> str:
    if math.isnan(ratio["median"]):
        return "-"
    return f"**{ratio['median']:.2f}** ({_number(ratio['low'])} to {_number(ratio['high'])})"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:.2f}"


def put_between_markers(text: str) -> None:
    """Replace what stands between the markers of docs/benchmarks.md."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def finite(value: Any) -> Any:
    """JSON has no infinity: what is never reached is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return value


def main() -> None:
    """Write the summary and the tables."""
    from benchmarks.quality.subjects import SUBJECTS  # noqa: PLC0415 - loads the models

    summaries, parts = {}, []
    for name, load in SUBJECTS.items():
        if not (FOLDER / f"{name}.jsonl").exists():
            continue
        subject = load()
        summaries[name] = summarise(name, subject.targets)
        parts.append(f"### {subject.title}\n\n{table(summaries[name])}")
    (FOLDER / "summary.json").write_text(json.dumps(finite(summaries), indent=1) + "\n")
    put_between_markers("\n\n".join(parts))


if __name__ == "__main__":
    main()

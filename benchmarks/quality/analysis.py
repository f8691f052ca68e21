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


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], *, limit: float = math.inf
) -> dict[str, float]:
    """Median of ours / theirs by seed, with a 95 % bootstrap interval over seeds.

    Where ours never arrives the ratio is infinite. Where theirs does not, it would have taken more
    than `limit`, so the ratio is below ours / limit: that bound stands in for it, against us. A
    seed on which neither arrives says nothing.

    Args:
        ours: By seed; infinite or NaN where there is no value.
        theirs: By the same seeds.
        limit: What theirs has at least where it is infinite: the steps of a run.

    Returns:
        `median`, `low`, `high`; `num_pairs` seeds that say something; `bound` is 1 where the median
        is only an upper bound.
    """
    pairs = [
        (a, b)
        for a, b in zip(ours, theirs, strict=True)
        if not (math.isnan(a) or math.isnan(b)) and (math.isfinite(a) or math.isfinite(b))
    ]
    if not pairs:
        return dict.fromkeys(("median", "low", "high"), math.nan) | {"num_pairs": 0, "bound": 0}
    ratios = np.array([a / (limit if math.isinf(b) else b) for a, b in pairs])
    random = np.random.default_rng(0)
    medians = np.sort(np.median(random.choice(ratios, (4_000, len(ratios))), axis=1))
    median = float(np.median(ratios))
    above = [ratio >= median for ratio, (_, b) in zip(ratios, pairs, strict=True) if math.isinf(b)]
    return {
        "median": median,
        "low": float(medians[int(0.025 * len(medians))]),
        "high": float(medians[int(0.975 * len(medians))]),
        "num_pairs": len(pairs),
        "bound": int(any(above)),
    }


def step_ratios(subject: str) -> dict[str, float]:
    """What a method's step costs beside AdamW's, as `step_ratio` measured it; empty before."""
    path = FOLDER / "step_ratio.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())["subjects"].get(subject, {})
    return {method: ratio["median_ratio"] for method, ratio in found.items()}


def summarise(subject: str, targets: Sequence[float]) -> dict[str, Any]:
    """Say everything of one subject, by method; methods without final runs are left out."""
    records = Records.of(subject)
    finals = {method: final_runs(records, method) for method in METHODS}
    if not finals[REFERENCE]:
        return {"targets": list(targets), "best_peers": {}, "methods": {}}
    costs = step_ratios(subject)
    peers = [best_peer(finals, target) for target in targets]
    return {
        "targets": list(targets),
        "best_peers": {str(t): peer for t, peer in zip(targets, peers, strict=True)},
        "methods": {
            method: _of_method(records, method, runs, finals[REFERENCE], targets)
            | {
                "step_ratio": costs.get(method, math.nan),
                "to_best_peer": [
                    _steps_ratio(runs, finals[peer], target) if peer else None
                    for target, peer in zip(targets, peers, strict=True)
                ],
            }
            for method, runs in finals.items()
            if runs
        },
    }


def best_peer(finals: Mapping[str, Sequence[Mapping[str, Any]]], target: float) -> str | None:
    """The peer with the lowest median of steps to a target, AdamW in either loop left out."""
    medians = {
        name: statistics.median(at["step"] for at in _crossings(runs, target))
        for name, runs in finals.items()
        if runs and METHODS[name].peer
    }
    return min(medians, key=lambda name: medians[name]) if medians else None


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
    place = swept.index(runs[0]["rate"])
    return {
        "title": METHODS[method].title,
        "rate": runs[0]["rate"],
        "rates": by_rate,
        "interior": 0 < place < len(swept) - 1,
        "near_best": sum(loss <= lowest * (1 + NEAR) for loss in by_rate.values()),
        "final_loss": statistics.median(losses),
        "final_low": float(np.quantile(losses, 0.25)),
        "final_high": float(np.quantile(losses, 0.75)),
        "final_ratio": paired_ratio(losses, [run["loss"] for run in reference]),
        "parameters": runs[0]["parameters"],
        "failures": sum(
            run["failure"] is not None or not math.isfinite(run["loss"])
            for final in (False, True)
            for run in records.of_method(method, final=final)
        ),
        "skipped_observations": sum(run.get("skipped_observations", 0) for run in runs),
        "targets": [_to_target(runs, reference, target) for target in targets],
        "final_retention": statistics.median(run["points"][-1]["retention"] for run in runs),
    }


def _to_target(
    runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], target: float
) -> dict[str, Any]:
    found, other = _crossings(runs, target), _crossings(reference, target)
    retained = [at["retention"] for at in found if math.isfinite(at["step"])]
    return {
        "loss": target,
        "steps": [at["step"] for at in found],
        "median_steps": statistics.median(at["step"] for at in found),
        "reached": len(retained),
        "ratio": _steps_ratio(runs, reference, target),
        "retention": statistics.median(retained) if retained else math.nan,
        "retention_ratio": paired_ratio(
            [at["retention"] for at in found], [at["retention"] for at in other]
        ),
    }


def _crossings(runs: Sequence[Mapping[str, Any]], target: float) -> list[dict[str, float]]:
    return [crossing(run["points"], target, extra_steps=run["extra_passes"]) for run in runs]


def _steps_ratio(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], target: float
) -> dict[str, float]:
    ours, theirs = ([at["step"] for at in _crossings(each, target)] for each in (runs, others))
    limit = max(run["points"][-1]["step"] + run["extra_passes"] for run in others)
    return paired_ratio(ours, theirs, limit=limit)


def table(summary: Mapping[str, Any]) -> str:
    """A subject's table in Markdown."""
    targets = summary["targets"]
    heads = ["method", "rate", "final loss (quartiles)", "to AdamW's"]
    heads += [f"steps to {target:g}" for target in targets]
    heads += ["seconds a step", "rates near best", "failed runs", "parameters"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for method in summary["methods"].values():
        cells = [
            method["title"],
            f"{method['rate']:g}{'' if method['interior'] else ' (at the edge)'}",
            f"{method['final_loss']:.3f} ({method['final_low']:.3f} to {method['final_high']:.3f})",
            _ratio(method["final_ratio"]),
            *(_steps(target) for target in method["targets"]),
            _number(method["step_ratio"]),
            f"{method['near_best']} of {len(method['rates'])}",
            str(method["failures"]),
            f"{method['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def retention_table(summary: Mapping[str, Any]) -> str:
    """Old-task loss where each target is first reached, and its ratio to AdamW's by seed."""
    heads = ["method", *(f"at {target:g}" for target in summary["targets"])]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for method in summary["methods"].values():
        cells = [method["title"], *(_retained(target) for target in method["targets"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _retained(target: Mapping[str, Any]) -> str:
    ratio, seeds = target["retention_ratio"], len(target["steps"])
    if ratio["num_pairs"] * 2 <= seeds:
        return f"reached by both on {ratio['num_pairs']} of {seeds} seeds"
    return f"{target['retention']:.3f}, {_ratio(ratio)}{_pairs(ratio, seeds)}"


def _steps(target: Mapping[str, Any]) -> str:
    reached, seeds = target["reached"], len(target["steps"])
    if not math.isfinite(target["median_steps"]):
        return f"never ({reached} of {seeds} seeds)"
    told = f"{target['median_steps']:.0f}, {_ratio(target['ratio'])}"
    return told + (f"; {reached} of {seeds} seeds" if reached < seeds else "")


def _pairs(ratio: Mapping[str, float], seeds: int) -> str:
    return "" if ratio["num_pairs"] == seeds else f"; {ratio['num_pairs']} of {seeds} seeds"


def _ratio(ratio: Mapping[str, float]) -> str:
    if math.isnan(ratio["median"]):
        return "-"
    bound = "under " if ratio["bound"] else ""
    interval = f"({_number(ratio['low'])} to {_number(ratio['high'])})"
    return f"{bound}**{_number(ratio['median'])}** {interval}"


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
        parts += [
            f"#### {subject.title}",
            table(summaries[name]),
            "Old-task loss at equal new-task loss:",
            retention_table(summaries[name]),
        ]
    (FOLDER / "summary.json").write_text(json.dumps(finite(summaries), indent=1) + "\n")
    put_between_markers("\n\n".join(parts))


if __name__ == "__main__":
    main()

"""The tables of the serving benchmark, as `docs/benchmarks.md` shows them.

python -m benchmarks.serving.table
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from benchmarks.serving.deployment import API, INFERENCE

FOLDER = RESULTS / "serving"
Result = Mapping[str, Any]


def ratio_rows(mixed: Result, activation: Result, first_token: Result) -> Iterator[list[str]]:
    """I1, I2, I3, I6 and I9, each beside its peer."""
    for name, title, peer, must, goal in (
        ("merged", "I1 ↑", "one merged adapter, this engine", "0.50", "0.65"),
        ("merged_transformers", "", "one merged adapter, `generate`", "", ""),
        ("peft_mixed", "I2 ↑", "PEFT `adapter_names`", "1.3", "2.0"),
        ("peft_in_turn", "I3 ↑", "PEFT, one after another", "3", "4.5"),
    ):
        one = mixed["ratios"][name]
        ours, theirs = (f"{one[side]:.1f} tokens/s" for side in ("above_median", "below_median"))
        cpu = _ratio(mixed["cpu_ratios"][name])
        ratio = f"{_ratio(one)}; processor time {cpu}"
        metric = f"{mixed['options']['adapters']} adapters in one batch"
        yield [title, metric, ours, f"{peer}: {theirs}", ratio, must, goal]
    for name, title, metric, must, goal in (
        ("from_files", "I6", "activate an adapter, 100 resident", "0.30", "0.08"),
        ("from_memory", "", "the same, from the copy in memory", "", ""),
    ):
        one = activation["ratios"][name]
        ours, theirs = (f"{one[side] * 1e3:.1f} ms" for side in ("above_median", "below_median"))
        yield [title, metric, ours, f"PEFT `load_adapter`: {theirs}", _ratio(one, 3), must, goal]
    for name, title, metric, must, goal in (
        ("warm", "I9", "first token, image seen before, other adapter", "0.30", "0.16"),
        ("again", "", "first token, the same request again", "", ""),
    ):
        one = first_token["ratios"][name]
        ours, theirs = (f"{one[side] * 1e3:.0f} ms" for side in ("above_median", "below_median"))
        yield [title, metric, ours, f"image not seen before: {theirs}", _ratio(one, 3), must, goal]


def _ratio(one: Result, digits: int = 2) -> str:
    median, low, high = (f"{one[key]:.{digits}f}" for key in ("median_ratio", "low", "high"))
    return f"**{median}** ({low} to {high})"


def exactness_rows(exactness: Result) -> Iterator[list[str]]:
    """Differences to merged models, by subject."""
    for name, title in (("smolvlm", "SmolVLM-256M's shape"), ("digits", "digits VLM")):
        one = exactness[name]
        yield [
            title,
            str(one["num_rows"]),
            str(one["num_tokens"]),
            f"{one['largest_logit']:.1f}",
            f"{one['largest_difference_to_merged']:.1e}",
            f"{one['largest_difference_to_alone']:.1e}",
            f"{one['rows_with_tokens_of_merged']} of {one['num_rows']}",
            f"{one['rows_with_tokens_of_alone']} of {one['num_rows']}",
        ]


def load_rows(load: Result) -> Iterator[list[str]]:
    """One line for each offered load."""
    for level in load["levels"]:
        yield [
            f"{level['fraction_of_capacity']:.2f}",
            f"{level['offered_per_second']:.1f}",
            f"{level['answers_per_second']:.1f}",
            f"{level['tokens_per_second']:.0f}",
            *(
                f"{level[f'{kind}_{q}_seconds']:.2f} s"
                for kind in ("latency", "first_token")
                for q in ("p50", "p99")
            ),
            f"{level['shed_share']:.0%}",
        ]


def memory_rows(memory: Result) -> Iterator[list[str]]:
    """One line for each number of registered adapters, and the slopes."""
    columns = (
        (f"{INFERENCE}_resident_bytes", "{:.0f} MB", 1e-6),
        (f"{API}_resident_bytes", "{:.0f} MB", 1e-6),
        ("p50_seconds", "{:.1f} ms", 1e3),
        ("mean_seconds", "{:.1f} ms", 1e3),
        ("p99_seconds", "{:.1f} ms", 1e3),
        ("worker_cpu_seconds_per_request", "{:.1f} ms", 1e3),
    )
    for level in memory["levels"]:
        values = [form.format(level[name] * unit) for name, form, unit in columns]
        yield [f"{level['num_registered']:,}", str(level["num_different"]), *values]
    slopes = memory["slopes"]
    yield ["slope", "", *(f"{slopes[n]:.3f}" if n in slopes else "" for n, _, _ in columns)]


def markdown(head: str, rows: Iterator[list[str]]) -> str:
    """A table."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def read(folder: Path, name: str) -> Any:
    """A result."""
    return json.loads((folder / f"{name}.json").read_text())


def main() -> None:
    """Print every table whose results are there."""
    for head, make, names in (
        (
            "id | metric | ours | peer | ratio, 95 % interval | must | goal",
            ratio_rows,
            ("mixed", "activation", "first_token"),
        ),
        (
            (
                "subject | rows | tokens | largest logit | to merged | to alone | merged's tokens"
                " | tokens alone"
            ),
            exactness_rows,
            ("exactness",),
        ),
        (
            (
                "offered / capacity | offered a second | answered a second | tokens a second | p50"
                " | p99 | first token p50 | first token p99 | turned away"
            ),
            load_rows,
            ("load",),
        ),
        (
            (
                "registered | asked for | worker's memory | API's memory | p50 | mean | p99"
                " | worker's CPU time"
            ),
            memory_rows,
            ("memory",),
        ),
    ):
        if all((FOLDER / f"{name}.json").exists() for name in names):
            print(markdown(head, make(*(read(FOLDER, name) for name in names))), end="\n\n")


if __name__ == "__main__":
    main()

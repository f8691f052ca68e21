"""Measure the front door under load.

    python -m benchmarks.load                      # everything, with 1,000,000 jobs (half an hour)
    python -m benchmarks.load ratios --jobs 10000 --rounds 3

Writes `benchmarks/results/load/*.json` and `docs/images/load/*.png`. It needs wrk
(`apt-get install wrk`) and what the tests need: PostgreSQL and Valkey from the environment.
"""

import argparse
from collections.abc import Callable
from typing import Any, Final

from benchmarks.load import overload, plots, ratios, slopes, tail
from benchmarks.load.stand import Stand, running_stand, say
from benchmarks.measure import write_result

PARTS: Final = ("ratios", "slopes", "tail", "overload")


def main() -> None:
    """Measure, write and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--jobs", type=int, default=1_000_000, help="rows of the jobs table")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each arm")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    options = parser.parse_args()
    with running_stand() as stand:
        for name in options.parts or PARTS:
            measured = measure(stand, name, options)
            say(str(write_result(f"load/{name}", {"num_jobs": options.jobs, **measured})))
    plots.main()


def measure(stand: Stand, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a part by its name."""
    jobs, rounds, seconds = options.jobs, options.rounds, options.seconds
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "ratios": lambda: ratios.compare(
            stand, stand.database(jobs), ratios.NAMES, rounds=rounds, seconds=seconds
        ),
        "slopes": lambda: {
            "looks": slopes.measure(stand, [size for size in slopes.SIZES if size <= jobs])
        },
        "tail": lambda: tail.measure(stand, jobs, rounds=rounds, seconds=seconds),
        "overload": lambda: overload.measure(stand, jobs, seconds=2 * seconds),
    }
    return parts[name]()


if __name__ == "__main__":
    main()

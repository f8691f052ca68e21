"""`make check-device DEVICE=cuda`: find out whether a device does what the service needs.

`python -m tests.check_device --device cuda [--short] [CHECK ...]`. Prints a report to paste into an
issue, and writes it to `build/check-device/`. Ends with status 1 when any check failed.
"""

import argparse
import datetime as dt
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from grit_core.config.devices import kind_of, normalize_device
from grit_core.errors import InvalidConfig
from tests.check_device.check import Bench, Check, Result
from tests.check_device.registry import CHECKS, find_check
from tests.check_device.report import ROOT, anonymize, private_names, render, to_json
from tests.check_device.runner import run_checks

OUTPUT: Final = Path("build/check-device")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        chosen = _choose(options.checks, short=options.short)
    except ValueError as error:
        print(f"check-device: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="check-device-") as folder:
        bench = Bench(
            device=options.device,
            folder=Path(folder),
            shared=Path(folder) / "models",
            short=options.short,
        )
        results = []
        for result in run_checks(chosen, bench):
            print(f"{result.outcome:9s}{result.seconds:6.1f} s  {result.name}", flush=True)
            results.append(result)
            if result.name == "device" and result.outcome != "passed":
                break  # nothing else can run
    write(results, options)
    return 1 if _failed(results) else 0


def write(results: list[Result], options: argparse.Namespace) -> None:
    """Print the report and write it."""
    header = {
        "command": f"make check-device DEVICE={options.device}",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "revision": _revision(),
    }
    if options.short or options.checks:
        words = ["--short"] * options.short + options.checks
        header["command"] = " ".join([
            "python -m tests.check_device --device",
            options.device,
            *words,
        ])
    names = private_names()
    results = [anonymize(result, names) for result in results]
    report = render(results, **header)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "REPORT.md").write_text(report, encoding="utf-8")
    (options.output / "report.json").write_text(to_json(results, **header), encoding="utf-8")
    print(f"\n{report}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.check_device", description=__doc__)
    parser.add_argument("checks", nargs="*", help="names of checks; all by default")
    parser.add_argument(
        "--device", type=_parse_device, default="cuda", help="cpu, cuda, cuda:1, mps or sim"
    )
    parser.add_argument("--short", action="store_true", help="only what shows the most")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the report")
    return parser


def _parse_device(text: str) -> str:
    """Return a device as the service writes it.

    Raises:
        argparse.ArgumentTypeError: The text names none.
    """
    if text == "sim":
        return text
    try:
        kind_of(text)
    except InvalidConfig:
        # No strategy, which the library takes too: a check is of one device.
        words = f"device is {text!r}; give one of cpu, cuda, cuda:N, mps, or sim, the simulated one"
        raise argparse.ArgumentTypeError(words) from None
    return normalize_device(text)


def _choose(names: list[str], *, short: bool) -> list[Check]:
    """Return the checks of a run; what the device is always comes first."""
    if names:
        return [find_check(name) for name in dict.fromkeys(["device", *names])]
    return [check for check in CHECKS if check.in_short or not short]


def _failed(results: list[Result]) -> bool:
    return any(each.outcome == "failed" for each in results) or results[0].outcome != "passed"


def _revision() -> str:
    """Return the commit of the code, or that it is not known."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

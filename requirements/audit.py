"""Look every locked package up in the Python advisory database: `make audit`.

Exit status 1 if a package has an advisory that `advisories.toml` does not excuse, if an excuse has
expired, or if a package could not be looked up at all: silence is no answer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LOCKS = ("api.lock", "worker.lock", "dev.lock")


def main() -> int:
    """Audit the locks and the pinned torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="torch's requirement, as in the Makefile")
    options = parser.parse_args()
    excused, faults = read_excuses((FOLDER / "advisories.toml").read_text(), today=date.today())
    with tempfile.TemporaryDirectory() as folder:
        torch = Path(folder) / "torch.txt"
        # An index's address is the deployment's; the version is what has advisories.
        torch.write_text(options.torch.split()[0] + "\n")
        for name, arguments in (
            *((lock, ["--require-hashes", "-r", str(FOLDER / lock)]) for lock in LOCKS),
            ("torch", ["--no-deps", "-r", str(torch)]),
        ):
            report = _pip_audit(arguments)
            found = judge(report, excused)
            print(f"{name}: {len(report['dependencies'])} packages, {len(found)} faults")
            faults += [f"{name}: {fault}" for fault in found]
    for fault in sorted(set(faults))[:40]:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def read_excuses(text: str, *, today: date) -> tuple[set[str], list[str]]:
    """Return the ids of advisories that are excused today, and what is wrong with the excuses."""
    excused: set[str] = set()
    faults: list[str] = []
    for entry in tomllib.loads(text).get("advisory", []):
        if not entry.get("reason") or not isinstance(entry.get("until"), date):
            faults.append(f"advisories.toml: {entry.get('id')} needs a reason and a date `until`")
        elif entry["until"] < today:
            faults.append(f"advisories.toml: the excuse of {entry['id']} ended {entry['until']}")
        else:
            excused.add(entry["id"])
    return excused, faults


def judge(report: dict[str, Any], excused: set[str]) -> list[str]:
    """Return the faults of one report of pip-audit."""
    faults = []
    unknown = [each["name"] for each in report["dependencies"] if "skip_reason" in each]
    if unknown:
        faults.append(
            f"{len(unknown)} packages could not be looked up ({', '.join(unknown[:5])}, ...):"
            " is https://pypi.org reachable from here?"
        )
    for package in report["dependencies"]:
        for advisory in package.get("vulns", []):
            if not excused & {advisory["id"], *advisory.get("aliases", [])}:
                fixed = ", ".join(advisory["fix_versions"]) or "no version"
                faults.append(
                    f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}"
                )
    return faults


def _pip_audit(arguments: list[str]) -> dict[str, Any]:
    command = ["pip-audit", "--disable-pip", "--progress-spinner=off", "--format=json"]
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [program, *command[1:], *arguments], check=False, capture_output=True, text=True
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"pip-audit gave no report: {done.stderr.strip()[-500:]}") from None
    return report


if __name__ == "__main__":
    sys.exit(main())

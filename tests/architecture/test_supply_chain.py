"""What we build from: every package pinned and hashed, none below a fixed vulnerability."""

import importlib.util
import re
import tomllib
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCKS = ["api.lock", "dev.lock", "supply.lock", "worker.lock"]
FLOORS = {
    "celery": "5.2.2",
    "pillow": "12.3.0",
    "python-multipart": "0.0.27",
    "starlette": "1.5.1",
    "torch": "2.10.0",
    "transformers": "4.50.0",
}
"""The first versions without the holes that `docs/reliability.md` lists."""


def requirements_of(lock: str) -> dict[str, list[str]]:
    """The lines of a lock: what is required, and the hashes that are accepted."""
    text = (ROOT / "requirements" / lock).read_text().replace("\\\n", " ")
    return {
        line.split(" --hash=")[0].strip(): re.findall(r"--hash=(\S+)", line)
        for line in text.splitlines()
        if line.strip() and not line.startswith("#")
    }


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_is_pinned_and_hashed(lock: str) -> None:
    found = requirements_of(lock)
    assert len(found) > 20
    for requirement, hashes in found.items():
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+( ; .+)?", requirement), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement


@pytest.mark.parametrize("package", FLOORS)
def test_no_package_is_below_the_version_that_closed_its_holes(package: str) -> None:
    floor = Version(FLOORS[package])
    assert Version(version(package)) >= floor
    pinned = [
        Version(re.split(r"[=; ]+", requirement)[1])
        for lock in LOCKS
        for requirement in requirements_of(lock)
        if requirement.startswith(f"{package}==")
    ]
    assert all(each >= floor for each in pinned)
    if package == "torch":  # an install step of its own, because its index is the deployment's
        pinned = [
            Version(each) for each in re.findall(r"torch==([\d.]+)", makefile() + dockerfile())
        ]
        assert len(set(pinned)) == 1
    assert pinned


def test_the_worker_has_the_packages_that_families_of_models_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    names = [re.split(r"[><=]", requirement)[0] for requirement in extras["families"]]
    assert "families" in extras["worker"][0]
    for lock in ("worker.lock", "dev.lock"):
        locked = {requirement.partition("==")[0] for requirement in requirements_of(lock)}
        assert locked >= {"num2words", "sentencepiece", "protobuf"} == set(names)
    api = {requirement.partition("==")[0] for requirement in requirements_of("api.lock")}
    assert api.isdisjoint(names)
    for module in ("google.protobuf", "num2words", "sentencepiece"):
        assert importlib.util.find_spec(module) is not None
        assert module in dockerfile()


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    """The script behind `make audit`."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_advisory_fails_the_audit_unless_it_is_excused(audit: ModuleType) -> None:
    report = {
        "dependencies": [
            {
                "name": "x",
                "version": "1.0",
                "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}],
            },
            {"name": "y", "version": "2.0", "vulns": []},
        ]
    }
    assert audit.judge(report, set()) == ["x 1.0: PYSEC-1, fixed in 1.1"]
    assert audit.judge(report, {"CVE-1"}) == []


def test_a_package_that_could_not_be_looked_up_fails_the_audit(audit: ModuleType) -> None:
    report = {"dependencies": [{"name": "x", "version": "1", "skip_reason": "not found"}]}
    [fault] = audit.judge(report, set())
    assert "1 packages could not be looked up (x" in fault


def test_an_excuse_needs_a_reason_and_ends(audit: ModuleType) -> None:
    text = (
        '[[advisory]]\nid = "A"\nreason = "not reachable"\nuntil = 2026-06-30\n'
        '[[advisory]]\nid = "B"\nuntil = 2026-06-30\n'
    )
    excused, faults = audit.read_excuses(text, today=date(2026, 6, 30))
    assert excused == {"A"}
    assert faults == ["advisories.toml: B needs a reason and a date `until`"]
    excused, faults = audit.read_excuses(text, today=date(2026, 7, 1))
    assert excused == set()
    assert "the excuse of A ended 2026-06-30" in faults[0]


def test_the_excuses_of_today_are_valid(audit: ModuleType) -> None:
    text = (ROOT / "requirements" / "advisories.toml").read_text()
    assert audit.read_excuses(text, today=date(2026, 1, 1))[1] == []

"""The device check itself: it runs on the CPU and on the simulated card, and its report is fit to
paste."""

import getpass
import json
import os
import re
import socket
import time
import warnings
from pathlib import Path

import pytest
import torch

from tests.check_device.__main__ import main
from tests.check_device.check import Bench, Check, Fault, Figures, NotHere, Result
from tests.check_device.devices import recorded_waits
from tests.check_device.registry import CHECKS, find_check
from tests.check_device.report import ROOT, anonymize, private_names, render, to_json
from tests.check_device.runner import run_checks

ON_THE_SIMULATED_ONE = (
    *("losses", "plain-modality", "one-base", "training-waits", "decoding-waits"),
    *("prompt-out-of-memory", "adapter-out-of-memory"),
)
"""What the CPU cannot show: the others pass there too (`make check-device DEVICE=sim`)."""

HEADER = {"command": "make check-device", "date": "2026-11-30", "revision": "1234abc"}


def outcomes(folder: Path) -> dict[str, str]:
    report = json.loads((folder / "report.json").read_text())
    return {each["name"]: each["outcome"] for each in report["checks"]}


# --- checks of every ending; they run in processes of their own


def hold(bench: Bench) -> Figures:
    return {"folder": str(bench.folder), "figure": 3}


def fail(_bench: Bench) -> Figures:
    raise Fault("the sum is off by 2")


def stumble(_bench: Bench) -> Figures:
    return {"never": torch.ones(2).reshape(3).shape[0]}


def pass_over(_bench: Bench) -> Figures:
    raise NotHere("there is one card")


def crash(_bench: Bench) -> Figures:
    os.write(2, b"the driver has said this\n")
    os._exit(7)


def hang(_bench: Bench) -> Figures:
    while True:
        time.sleep(1)


def results(tmp_path: Path) -> dict[str, Result]:
    checks = [
        Check(
            name=run.__name__,
            sentence=f"{run.__name__} | holds",
            run=run,
            in_short=False,
            timeout_seconds=3 if run is hang else 120,
        )
        for run in (hold, fail, stumble, pass_over, crash, hang, hold)
    ]
    bench = Bench(device="cpu", folder=tmp_path, shared=tmp_path / "models")
    found = list(run_checks(checks, bench))
    assert [each.name for each in found] == [check.name for check in checks]
    assert found[-1].outcome == "passed"  # what came before has ended nothing
    return {each.name: each for each in found}


@pytest.mark.slow
def test_a_check_that_fails_crashes_or_hangs_ends_no_other_one(tmp_path: Path) -> None:
    found = results(tmp_path)
    assert {name: each.outcome for name, each in found.items()} == {
        "hold": "passed",
        "fail": "failed",
        "stumble": "failed",
        "pass_over": "not here",
        "crash": "failed",
        "hang": "failed",
    }
    assert found["hold"].figures["figure"] == 3
    assert found["fail"].remark == "the sum is off by 2"
    assert re.match(r"RuntimeError: shape .*test_check_device.py:\d+\)", found["stumble"].remark)
    assert found["pass_over"].remark == "there is one card"
    assert found["crash"].remark.startswith("Its process ended with status 7.")
    assert "the driver has said this" in found["crash"].remark
    assert found["hang"].remark == "It did not end within 3 s."
    text = render(list(found.values()), **HEADER)
    assert "1 passed, 4 failed, 1 could not run here" in text
    assert "| fail | **no** | fail \\| holds |" in text
    report = json.loads(to_json(list(found.values()), **HEADER))
    assert [each["outcome"] for each in report["checks"]] == [e.outcome for e in found.values()]


def test_a_report_holds_no_path_and_no_name_of_the_machine_or_user() -> None:
    private = [str(ROOT), str(Path.home()), socket.gethostname(), getpass.getuser()]
    said = " and ".join(f"{each}/x" for each in private)
    result = Result(
        name="one",
        sentence="holds",
        outcome="failed",
        seconds=1,
        figures={"place": f"{ROOT}/tests"},
        remark=said,
    )
    found = anonymize(result, private_names())
    assert found.figures["place"] == "<project>/tests"
    assert not any(each in found.remark for each in private)


def test_names_of_checks_are_unique_and_the_device_comes_first() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert names[0] == "device"
    with pytest.raises(ValueError, match="there is no check 'nothing'; there are device, "):
        find_check("nothing")


def test_a_device_that_is_not_there_says_so_and_fails(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    assert main(["--device", "cuda", "--output", str(tmp_path)]) == 1
    assert outcomes(tmp_path) == {"device": "not here"}
    assert "This machine has no cuda; it has cpu" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.parametrize("device", ["tpu", "cuda:one", "mps:1", "sim:1", "auto_performance"])
def test_a_text_that_names_no_device_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--device", device])
    said = " ".join(capsys.readouterr().err.split())
    assert f"argument --device: device is '{device}'; give one of cpu, cuda, cuda:N, mps" in said


def test_an_unknown_check_is_refused_with_the_names_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--output", str(tmp_path), "trainign"]) == 2
    said = capsys.readouterr().err
    assert "there is no check 'trainign'; there are device, training," in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shortened_check_passes_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--device", "cpu", "--short", "--output", str(tmp_path)])
    report = (tmp_path / "REPORT.md").read_text()
    assert outcomes(tmp_path) == {
        check.name: "not here" if re.search(r"waits|nccl", check.name) else "passed"
        for check in CHECKS
        if check.in_short
    }, report
    assert status == 0
    assert report in capsys.readouterr().out
    assert str(ROOT) not in report


@pytest.mark.slow
def test_the_check_passes_on_the_simulated_accelerator(tmp_path: Path) -> None:
    status = main(["--device", "sim", "--output", str(tmp_path), *ON_THE_SIMULATED_ONE])
    assert status == 0, (tmp_path / "REPORT.md").read_text()
    assert outcomes(tmp_path) == dict.fromkeys(("device", *ON_THE_SIMULATED_ONE), "passed")


def test_warnings_of_cuda_are_counted_by_the_line_of_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch issues them from C++, below the line of Python that waits."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with recorded_waits("cuda") as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert modes == ["warn", "default"]
    assert len(waits) == 2
    assert len({wait.place for wait in waits}) == 1

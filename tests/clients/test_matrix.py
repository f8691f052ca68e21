"""The client matrix of docs/openai.md, and the drivers of the client that this project installs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.environments import CLIENTS, HERE, Client
from tests.clients.matrix import BEGIN, CHECKS, END, FILE, Row, render, write
from tests.clients.service import running_service

DEFINED = {
    "check": re.compile(r'^@check\("([^"]+)"\)$', re.MULTILINE),
    "method": re.compile(r'^  async "?([a-z ]+)"?\(\) \{$', re.MULTILINE),
}


def load_checks(client: Client) -> set[str]:
    pattern = DEFINED["method" if client.from_npm else "check"]
    return set(pattern.findall(client.driver.read_text()))


def test_a_table_tells_passed_failed_and_missing_checks_apart() -> None:
    text = render([Row("a client", "1.2", {"chat": True, "stream": False})])
    line = next(line for line in text.splitlines() if line.startswith("| a client"))
    assert line.split(" | ")[1:5] == ["1.2", "yes", "**no**", "-"]
    assert all(f"- **{check}**" in text for check in CHECKS)


def test_writing_replaces_only_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    write([Row("a client", "1.2", {"chat": True})], page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}")
    assert text.endswith(f"{END}after\n")
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        write([], page)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_page_has_each_check_of_each_client_and_none_fails(client: Client) -> None:
    table = FILE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    row = next(line for line in table.splitlines() if line.startswith(f"| {client.name} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    tried = {check for check, cell in zip(CHECKS, cells[2:], strict=True) if cell == "yes"}
    assert tried == load_checks(client)
    assert "**no**" not in row


@pytest.mark.parametrize(
    "client", [each for each in CLIENTS if not each.from_npm], ids=lambda client: client.name
)
def test_the_page_names_the_locked_version(client: Client) -> None:
    lock = (HERE / f"locks/{client.lock}.txt").read_text()
    found = re.search(rf"^{client.package}==(\S+)", lock, re.MULTILINE)
    assert found is not None
    assert f"| {client.name} | {found[1]} |" in FILE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_openais_own_client_passes_every_check(tmp_path: Path) -> None:
    driver = HERE / "python" / "openai_client.py"
    with running_service(tmp_path / "service") as target:
        done = subprocess.run(
            [sys.executable, driver],
            env=os.environ | target.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result for result in found if not result["passed"]] == []
    assert {result["check"] for result in found} == CHECKS.keys()

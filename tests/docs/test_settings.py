"""The page of settings is the one that the settings write, and other pages name no others."""

import re
from pathlib import Path

import pytest

from store.__main__ import main
from store.configuration.faults import CLIENT_VARIABLES, variable_name
from store.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"
VARIABLES = [variable_name(name) for name in Settings.model_fields]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    assert PAGE.read_text(encoding="utf-8") == printed, "run `make settings`"


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_setting_has_a_row_with_a_meaning(variable: str) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{variable}`")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 4
    assert all(cells)
    assert cells[3].endswith(".")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_settings_that_there_are(page: Path) -> None:
    named = set(re.findall(r"\bGRIT_[A-Z0-9_]+[A-Z0-9]\b(?![_*])", page.read_text()))
    # The page's own example of a misspelling, and beginnings of names (`GRIT_S3_*`).
    examples = {"GRIT_HEARTBEAT_SECOND"} if page == PAGE else set()
    assert named <= {*VARIABLES, *CLIENT_VARIABLES, *examples}

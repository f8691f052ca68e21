"""The table of families is the one that their cases make."""

from tests.families import table


def test_the_document_of_families_is_up_to_date_with_the_cases() -> None:
    written = table.FILE.read_text(encoding="utf-8")
    assert written == table.write(), "run `python -m tests.families`"

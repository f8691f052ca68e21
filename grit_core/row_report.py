"""What a check of a job's rows comes to: warnings, or one refusal that names every bad row."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Final

from grit_core.data.row_checker import Finding
from grit_core.errors import InvalidDataset, InvalidRows
from grit_core.events import TrainingEvent, Warned
from grit_core.processes import Processes
from grit_core.row_check import MAX_LISTED, RowCheck, RowSet, Tally
from grit_core.training_rows import TrainingRows

MAX_NAMED: Final = 20
"""Unusable rows that stand in the message; `row_check.MAX_LISTED` are in the details."""

_SHORTENED: Final = {
    "training": ("rows_skipped", "rows_truncated"),
    "evaluation": ("eval_rows_skipped", "eval_rows_truncated"),
    "retention": ("retention_rows_skipped", "retention_rows_truncated"),
}
"""Codes of the warnings about rows left out and cut, by purpose."""


def checked(
    rows: TrainingRows, *, model: str, should_stop: Callable[[], bool]
) -> Generator[TrainingEvent, None, bool]:
    """Check all rows of a job and tell how far that is; return whether it came to its end.

    Rows that cannot be used are refused together (`refuse_unusable`).

    Args:
        rows: Those of the job.
        model: Where the base model's processor lies.
        should_stop: Asked after every row.
    """
    processes = Processes.current()
    sets = rows.sets()
    processes.refuse_difference(bytes.fromhex(rows.digest()), what="the rows that they read")
    check = RowCheck(sets, model=model, should_stop=should_stop, processes=processes)
    if not (yield from check.run()):
        return False
    refuse_unusable(sets, check.tallies)
    yield from _bounded(rows)
    yield from shortened(sets, check.tallies)
    return True


def refuse_unusable(sets: Sequence[RowSet], tallies: Sequence[Tally]) -> None:
    """Refuse a job of which rows cannot be used.

    Raises:
        InvalidRows: Some cannot; all of them are counted, the first are named.
        InvalidDataset: No row of a purpose is left.
    """
    count = sum(tally.unusable for tally in tallies)
    if count:
        first = _by_file(sets, tallies)[:MAX_LISTED]
        named = [finding.words for _, finding in first[:MAX_NAMED]]
        total = sum(tally.num_rows for tally in tallies)
        head = [f"{count} of {total} rows cannot be used:"] if count > 1 else []
        tail = [f"and {count - len(named)} more."] if count > len(named) else []
        raise InvalidRows(
            "\n".join([*head, *named, *tail]),
            details={
                "num_bad_rows": count,
                "bad_rows": [
                    {"file": name, "line": each.line, "detail": each.words} for name, each in first
                ],
            },
        )
    for each, tally in zip(sets, tallies, strict=True):
        if each.used and not tally.usable:
            raise InvalidDataset(
                f"{each.rows.file.name}: no row is left for {each.purpose}: of {tally.num_rows}"
                " none is within training.max_length"
                f" ({each.rows.row_encoder.max_length} tokens), and longer ones are left out; raise"
                " max_length, shorten the rows, or set training.on_long_rows to truncate."
            )


def shortened(sets: Sequence[RowSet], tallies: Sequence[Tally]) -> Iterator[Warned]:
    """Count the rows that are left out or cut for their length, once for the whole job."""
    for each, tally in zip(sets, tallies, strict=True):
        for code, count, done, lines in zip(
            _SHORTENED[each.purpose],
            (tally.left_out, tally.cut),
            ("Left out", "Cut"),
            (tally.lines_left_out, tally.lines_cut),
            strict=True,
        ):
            if each.used and count:
                more = f" and {count - len(lines)} more" if count > len(lines) else ""
                yield Warned(
                    code=code,
                    message=f"{done}, being longer than {each.rows.row_encoder.max_length} tokens:"
                    f" {count} of {tally.num_rows} rows for {each.purpose}, lines"
                    f" {', '.join(map(str, lines))}{more} of {each.rows.file.name}.",
                )


def _by_file(sets: Sequence[RowSet], tallies: Sequence[Tally]) -> list[tuple[str, Finding]]:
    """The unusable rows by file and line; the rows of one file may serve two purposes."""
    found: dict[str, tuple[str, list[Finding]]] = {}
    for each, tally in zip(sets, tallies, strict=True):
        file = each.rows.file
        _, findings = found.setdefault(str(file.path), (file.name, []))
        findings.extend(tally.first_unusable)
    return [(name, finding) for name, findings in found.values() for finding in sorted(findings)]


def _bounded(rows: TrainingRows) -> Iterator[Warned]:
    """Say that a loss is measured on some rows only."""
    retained = 0 if rows.retention is None else len(rows.retention.file)
    for purpose, chosen, given in (
        ("evaluation", len(rows.eval_indices), len(rows.eval_candidates)),
        ("retention", len(rows.retention_indices), retained),
    ):
        if chosen < given:
            yield Warned(
                code=f"{purpose}_rows_bounded",
                message=f"The {purpose} loss is measured on {chosen} of {given} rows, chosen by"
                " training.seed; training.max_eval_rows is the bound, and null takes all.",
            )

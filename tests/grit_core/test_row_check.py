"""All rows of a job are checked before its first step, and what is wrong is told at once."""

import dataclasses
import itertools
import os
import signal
import tracemalloc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from grit_core import training_run
from grit_core.check_process import CheckProcess
from grit_core.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from grit_core.data.encoder import ChatEncoder
from grit_core.data.row_checker import RowFate
from grit_core.data.rows import EncodedRows
from grit_core.errors import InvalidDataset, InvalidRows
from grit_core.events import (
    Evaluated,
    RowsChecked,
    StepCompleted,
    TrainingEvent,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    Warned,
)
from grit_core.models.pretrained import load_processor
from grit_core.processes import Processes
from grit_core.row_check import CHUNK_ROWS, MAX_LINES, MAX_LISTED, HelperRule, RowCheck, RowSet
from grit_core.row_file import RowFile
from grit_core.training import train
from grit_core.training_job import TrainingJob
from grit_core.training_rows import open_rows
from tests.grit_core.training_jobs import tiny_job
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

NOW = HelperRule(after_seconds=0.0, left_seconds=0.0, num_processes=2)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("row-check")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model cannot be loaded: the rows are checked without it."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(training_run, "load_base_model", load)


def with_rows(job: TrainingJob, path: Path, rows: list[dict[str, Any]]) -> TrainingJob:
    return dataclasses.replace(job, dataset=write_jsonl(path, rows))


def bad_rows(count: int, *lines: int) -> list[dict[str, Any]]:
    rows = tiny_chat_rows(count, images=False)
    for line in lines:
        rows[line - 1]["messages"][1]["content"] = "<|im_end|>"
    return rows


def long_rows(count: int, *lines: int) -> list[dict[str, Any]]:
    rows = tiny_chat_rows(count, images=False)
    for line in lines:
        rows[line - 1]["messages"][1]["content"] = "x" * 300
    return rows


def check_of(
    tmp: Path, rows: list[dict[str, Any]], *, on_long_rows: str = "reject", **options: Any
) -> RowCheck:
    model = str(tiny_causal_folder(tmp))
    path = write_jsonl(tmp / f"rows-{len(rows)}-{on_long_rows}.jsonl", rows)
    encoded = EncodedRows(
        RowFile(path, name="mine.jsonl"),
        ChatEncoder(load_processor(model)),
        max_length=200,
        on_long_rows=on_long_rows,
    )
    return RowCheck(
        [RowSet(purpose="training", rows=encoded, indices=range(len(rows)))],
        model=model,
        processes=Processes(),
        **{"should_stop": lambda: False, **options},
    )


def told_by(run: Generator[RowsChecked, None, bool]) -> tuple[list[RowsChecked], bool]:
    """What a check tells, and whether it came to its end."""
    told = []
    while True:
        try:
            told.append(next(run))
        except StopIteration as end:
            return told, end.value


@pytest.mark.usefixtures("no_model")
def test_all_bad_rows_of_all_files_are_told_at_once_by_the_users_names(tmp: Path) -> None:
    job = dataclasses.replace(
        tiny_job(tmp, text_only=True, work="bad"),
        dataset=write_jsonl(tmp / "0a1b.jsonl", bad_rows(40, *range(3, 33))),
        dataset_name="chats.jsonl",
        eval_dataset=write_jsonl(tmp / "2c3d.jsonl", bad_rows(5, 2)),
        retention_dataset=write_jsonl(tmp / "4e5f.jsonl", bad_rows(5, 4)),
        retention_dataset_name="old.jsonl",
    )
    with pytest.raises(InvalidRows) as caught:
        list(train(job))
    head, *named, tail = str(caught.value).splitlines()
    assert head == "32 of 50 rows cannot be used:"
    assert len(named) == 20
    assert named[0].startswith("chats.jsonl, line 3: the text of the assistant holds '<|im_end|>'")
    assert tail == "and 12 more."
    details = caught.value.details
    assert details["num_bad_rows"] == 32
    listed = [(each["file"], each["line"]) for each in details["bad_rows"]]
    expected = [("chats.jsonl", line) for line in range(3, 33)]
    assert listed == [*expected, ("2c3d.jsonl", 2), ("old.jsonl", 4)]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("purpose", ["training", "evaluation", "retention"])
def test_a_purpose_without_a_usable_row_is_refused_at_once(tmp: Path, purpose: str) -> None:
    job = tiny_job(
        tmp, text_only=True, work="nothing", max_length=200, on_long_rows="skip", num_rows=3
    )
    unusable = write_jsonl(tmp / "unusable.jsonl", long_rows(3, 1, 2, 3))
    field = {"training": "dataset", "evaluation": "eval_dataset"}.get(purpose, "retention_dataset")
    changed = dataclasses.replace(job, **{field: unusable})
    with pytest.raises(InvalidDataset) as caught:
        list(train(changed))
    assert str(caught.value).startswith(
        f"unusable.jsonl: no row is left for {purpose}: of 3 none is within"
        " training.max_length (200 tokens)"
    )


def test_rows_left_out_or_cut_are_counted_once_with_their_first_lines(tmp: Path) -> None:
    lines = range(2, 2 + MAX_LINES + 5)
    rows = long_rows(40, *lines)
    for on_long_rows, code, done in (
        ("skip", "rows_skipped", "Left out"),
        ("truncate", "rows_truncated", "Cut"),
    ):
        job = tiny_job(
            tmp, text_only=True, work=code, max_length=200, on_long_rows=on_long_rows, max_steps=30
        )
        events = list(train(with_rows(job, tmp / "counted.jsonl", rows)))
        warned = [each for each in events if isinstance(each, Warned) and "rows" in each.code]
        assert [each.code for each in warned] == [code]
        shown = ", ".join(str(line) for line in lines[:MAX_LINES])
        assert warned[0].message == (
            f"{done}, being longer than 200 tokens: 25 of 40 rows for training, lines {shown} and 5"
            " more of counted.jsonl."
        )


@pytest.mark.usefixtures("no_model")
def test_bad_rows_of_a_file_that_is_split_are_told_in_the_order_of_their_lines(tmp: Path) -> None:
    job = tiny_job(tmp, text_only=True, work="ordered", eval_fraction=0.5)
    with pytest.raises(InvalidRows) as caught:
        list(train(with_rows(job, tmp / "ordered.jsonl", bad_rows(12, *range(1, 13)))))
    assert [each["line"] for each in caught.value.details["bad_rows"]] == list(range(1, 13))


def test_an_evaluation_has_no_more_rows_than_it_may(tmp: Path) -> None:
    held_out = write_jsonl(tmp / "many.jsonl", tiny_chat_rows(30, images=False))
    job = dataclasses.replace(
        tiny_job(tmp, text_only=True, work="bounded", max_eval_rows=7, max_steps=3),
        eval_dataset=held_out,
        retention_dataset=held_out,
    )
    events = list(train(job))
    assert next(e for e in events if isinstance(e, TrainingStarted)).num_eval_rows == 7
    messages = {event.code: event.message for event in events if isinstance(event, Warned)}
    assert messages["evaluation_rows_bounded"] == (
        "The evaluation loss is measured on 7 of 30 rows, chosen by training.seed;"
        " training.max_eval_rows is the bound, and null takes all."
    )
    assert "7 of 30 rows" in messages["retention_rows_bounded"]
    assert any(isinstance(event, Evaluated) for event in events)
    chosen = [open_rows(job) for _ in range(2)]
    assert list(chosen[0].eval_indices) == list(chosen[1].eval_indices)
    assert sorted(set(chosen[0].eval_indices)) == list(chosen[0].eval_indices)
    other = open_rows(dataclasses.replace(job, training=dataclasses.replace(job.training, seed=8)))
    assert list(other.eval_indices) != list(chosen[0].eval_indices)


def test_a_split_keeps_its_rows_out_of_training_though_only_some_are_evaluated(tmp: Path) -> None:
    job = tiny_job(
        tmp, text_only=True, work="split", num_rows=40, eval_fraction=0.5, max_eval_rows=3
    )
    rows = open_rows(job)
    assert len(rows.train_indices) == 20
    assert len(rows.eval_indices) == 3
    assert not set(rows.train_indices) & set(rows.eval_candidates)
    assert set(rows.eval_indices) <= set(rows.eval_candidates)
    assert sum(len(each.indices) for each in rows.sets()) == 40
    everything = dataclasses.replace(job.training, max_eval_rows=None)
    assert len(open_rows(dataclasses.replace(job, training=everything)).eval_indices) == 20


@pytest.mark.usefixtures("no_model")
def test_a_bad_row_that_is_not_evaluated_is_told_all_the_same(tmp: Path) -> None:
    job = dataclasses.replace(
        tiny_job(tmp, text_only=True, work="aside", max_eval_rows=1),
        eval_dataset=write_jsonl(tmp / "aside.jsonl", bad_rows(6, 1, 6)),
    )
    with pytest.raises(InvalidRows, match=r"(?s)aside\.jsonl, line 1: .*aside\.jsonl, line 6: "):
        list(train(job))


@pytest.mark.usefixtures("no_model")
def test_a_check_that_is_asked_to_stop_ends_before_the_model_is_loaded(tmp: Path) -> None:
    job = with_rows(
        tiny_job(tmp, text_only=True, work="stopped"), tmp / "ten.jsonl", bad_rows(10, 9)
    )
    asked = itertools.count()
    events = list(train(job, should_stop=lambda: next(asked) == 3))
    assert events == [TrainingStopped(step=0, reason="Stopped as asked, while rows were checked.")]


def test_a_resumed_job_does_not_check_its_rows_again(tmp: Path) -> None:
    whole = tiny_job(tmp, text_only=True, work="whole", eval_fraction=0.2)
    expected = list(train(whole))
    job = dataclasses.replace(whole, work_dir=tmp / "resumed")
    stopped = itertools.count()
    first = list(train(job, should_stop=lambda: next(stopped) >= 10 + 3))
    assert isinstance(first[-1], TrainingStopped)
    folder = job.work_dir / "checkpoints" / f"step-{first[-1].step}"
    resumed = list(train(job, resume_from=folder))
    assert checks_of(first) == [RowsChecked(done=10, total=10)]
    assert checks_of(resumed) == []
    finished = [each for each in (expected[-1], resumed[-1]) if isinstance(each, TrainingFinished)]
    assert finished[0] == finished[1]
    for path in (whole.work_dir / "adapter").iterdir():
        assert (job.work_dir / "adapter" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("told", [None, "0" * 64])
def test_a_checkpoint_that_tells_of_no_check_or_of_another_is_checked(
    tmp: Path, told: str | None
) -> None:
    job = tiny_job(tmp, text_only=True, work=f"told-{told}", max_steps=2)
    list(train(job))
    saved = load_checkpoint(job.work_dir / "checkpoints" / "step-2")
    values = {**saved.values, "rows_checked": told}
    folder = save_checkpoint(
        tmp / f"changed-{told}", Checkpoint(step=2, tensors=saved.tensors, values=values)
    )
    assert checks_of(train(job, resume_from=folder)) == [RowsChecked(done=10, total=10)]


def checks_of(events: Iterator[TrainingEvent] | list[TrainingEvent]) -> list[RowsChecked]:
    return [event for event in events if isinstance(event, RowsChecked)]


def test_rows_are_checked_before_training_starts(tmp: Path) -> None:
    kinds = [type(event) for event in train(tiny_job(tmp, text_only=True, work="first"))]
    assert kinds.index(RowsChecked) < kinds.index(TrainingStarted) < kinds.index(StepCompleted)


def test_a_long_check_tells_how_far_it_is(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grit_core.row_check.REPORT_SECONDS", 0.0)
    check = check_of(tmp, tiny_chat_rows(3 * CHUNK_ROWS, images=False))
    told, complete = told_by(check.run())
    assert complete
    assert [each.done for each in told] == [64, 128, 192, 192]
    assert {each.total for each in told} == {192}


def test_no_more_than_a_thousand_bad_rows_are_kept_and_all_are_counted(tmp: Path) -> None:
    count = MAX_LISTED + 3 * CHUNK_ROWS
    check = check_of(tmp, bad_rows(count, *range(1, count + 1)))
    told_by(check.run())
    (tally,) = check.tallies
    assert (tally.unusable, tally.usable) == (count, 0)
    assert [each.line for each in tally.first_unusable] == list(range(1, MAX_LISTED + 1))


@pytest.mark.slow
def test_a_check_keeps_nothing_of_sound_rows(tmp: Path) -> None:
    check = check_of(tmp, tiny_chat_rows(40 * CHUNK_ROWS, images=False))
    run = check.run()
    tracemalloc.start()
    try:
        for chunk in itertools.islice(check._chunks(), 20):
            assert check._settle(chunk)
        halfway, _ = tracemalloc.get_traced_memory()
        assert told_by(run)[1]
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept - halfway < 40_000
    assert peak < 1_000_000


@pytest.mark.slow
def test_further_processes_find_what_one_process_finds(tmp: Path) -> None:
    rows = long_rows(9 * CHUNK_ROWS, *range(1, 9 * CHUNK_ROWS, 7))
    rows[300]["messages"][1]["content"] = "<|im_end|>"
    alone = check_of(tmp, rows, on_long_rows="skip")
    assert told_by(alone.run())[1]
    helped = check_of(tmp, rows, on_long_rows="skip", helpers=NOW)
    told, complete = told_by(helped.run())
    assert complete
    assert told[-1] == RowsChecked(done=len(rows), total=len(rows))
    assert helped.tallies == alone.tallies
    (tally,) = helped.tallies
    assert tally.left_out > MAX_LINES
    assert [each.fate for each in tally.first_unusable] == [RowFate.UNUSABLE]
    assert tally.first_unusable[0].words.startswith("mine.jsonl, line 301: ")


@pytest.mark.slow
def test_rows_of_a_process_that_was_killed_are_checked_by_the_one_that_started_it(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    class Killed(CheckProcess):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            started.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr("grit_core.row_check.CheckProcess", Killed)
    rows = bad_rows(6 * CHUNK_ROWS, 5, 200, 384)
    check = check_of(tmp, rows, helpers=NOW)
    assert told_by(check.run())[1]
    assert len(started) == 2
    (tally,) = check.tallies
    assert (tally.num_rows, tally.unusable) == (len(rows), 3)


@pytest.mark.slow
def test_processes_that_help_end_when_the_check_is_asked_to_stop(
    tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[CheckProcess] = []

    class Kept(CheckProcess):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            started.append(self)

    monkeypatch.setattr("grit_core.row_check.CheckProcess", Kept)
    asked = itertools.count()
    check = check_of(
        tmp,
        bad_rows(6 * CHUNK_ROWS),
        helpers=NOW,
        should_stop=lambda: next(asked) > CHUNK_ROWS,
    )
    assert told_by(check.run()) == ([], False)
    assert len(started) == 2
    assert all(each._process.poll() is not None for each in started)


@pytest.mark.slow
def test_a_process_that_helps_does_not_outlive_the_one_that_started_it(tmp: Path) -> None:
    check = check_of(tmp, bad_rows(1))
    encoder = check.sets[0].rows.row_encoder
    file = check.sets[0].rows.file
    process = CheckProcess(model=check._model, row_encoder=encoder, files=[file])
    assert process.check(0, [file.place(0)]) == []
    process.close()  # what the kernel does when a process dies
    assert process._process.wait(timeout=60) == 0

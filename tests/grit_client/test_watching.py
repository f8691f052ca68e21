"""What a person sees of a job, on a terminal and elsewhere."""

import io
from collections.abc import Iterator
from typing import Any, cast

import pytest
from rich.console import Console

from grit_client.answers import Job
from grit_client.client import GritClient
from grit_client.commands.plans import render_plan
from grit_client.commands.tables import cell, duration, size, table
from grit_client.commands.watching import describe, follow, numbers


def job(status: str, step: int = 0, **fields: Any) -> Job:
    progress = {
        "step": step, "total_steps": 100, "train_loss": 1.5 - step / 100, "eval_loss": None,
        "learning_rate": 2e-4, "tokens_per_second": 1234.5, "remaining_seconds": 75.0,
    }  # fmt: skip
    return cast("Job", {"id": "job_1", "status": status, "progress": progress, **fields})


class Recorded(GritClient):
    """A client that has seen these states; nothing is sent."""

    def __init__(self, states: list[Job]) -> None:
        super().__init__("http://127.0.0.1:1")
        self.states = states

    def watch(self, job: str, *, timeout_seconds: float | None = None) -> Iterator[Job]:
        del job, timeout_seconds
        yield from self.states


STATES = [
    job("queued", queue={"position": 2}),
    *[job("running", step, phase="training") for step in range(0, 101, 2)],
    job("succeeded", 100),
]


def test_elsewhere_a_job_takes_a_dozen_lines() -> None:
    out = io.StringIO()
    with Recorded(STATES) as client:
        last = follow(client, "job_1", console=Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert last["status"] == "succeeded"
    assert lines[0].startswith("queued (place 2)")
    assert lines[-1].startswith("succeeded")
    assert 10 <= len(lines) <= 14
    assert "loss 0.9000" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_while_rows_are_checked_the_way_is_counted_in_rows() -> None:
    out = io.StringIO()
    states = [
        cast(
            "Job",
            {
                **job("running", phase="checking"),
                "progress": {"checked_rows": done, "rows_to_check": 200_000},
            },
        )
        for done in range(0, 200_001, 2_000)
    ]
    with Recorded(states) as client:
        follow(client, "job_1", console=Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert lines[0] == "running (checking)  0/200000"
    assert lines[-1] == "running (checking)  200000/200000"
    assert len(lines) == 11


def test_on_a_terminal_a_bar_shows_the_numbers() -> None:
    out = io.StringIO()
    with Recorded(STATES) as client:
        follow(client, "job_1", console=Console(file=out, width=160, force_terminal=True))
    for part in ("succeeded", "100/100", "loss 0.5000", "lr 2.00e-04", "1,234 tok/s", "1 min 15 s"):
        assert part in out.getvalue()


def test_on_a_terminal_a_job_without_steps_shows_what_it_does_and_claims_no_progress() -> None:
    states = [job("running", phase="compressing"), job("succeeded")]
    for each in states:
        each["progress"] = {"step": 0, "total_steps": 0}
    out = io.StringIO()
    with Recorded(states) as client:
        follow(client, "job_1", console=Console(file=out, width=160, force_terminal=True))
    assert "running (compressing)" in out.getvalue()
    assert "0/?" in out.getvalue()


def test_states_that_are_taken_are_not_shown() -> None:
    out, states = io.StringIO(), []
    with Recorded(STATES) as client:
        follow(client, "job_1", console=Console(file=out), on_state=states.append)
    assert states == STATES
    assert out.getvalue() == ""


def test_numbers_that_are_not_known_are_left_out() -> None:
    assert numbers({}) == ""
    assert numbers({"train_loss": None, "eval_loss": 0.25}) == "eval 0.2500"


def test_a_waiting_job_says_what_it_waits_for() -> None:
    assert describe(job("queued", queue={"reason": "no live worker"})) == "queued (no live worker)"
    assert describe(job("paused", phase="training")) == "paused"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.6, "1 min 00 s"), (75, "1 min 15 s"), (7384, "2 h 03 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_read_well() -> None:
    assert [size(value) for value in (0, 1023, 1536, 5 * 2**40)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 TiB",
    ]  # fmt: skip
    assert size(None) is None


def test_control_characters_and_markup_stay_text() -> None:
    out = io.StringIO()
    hostile = "[bold]x[/bold]\x1b[2J\x07"
    Console(file=out, force_terminal=True, width=80).print(table(["name"], [[hostile]]))
    assert "[bold]x[/bold]" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()
    assert "\\x1b[2J\\x07" in out.getvalue()
    assert cell(1234567).plain == "1,234,567"


def test_a_plan_names_every_layer_and_each_reason_once() -> None:
    layers = [
        {
            "name": f"model.text.layers.{block}.v_proj", "modality": "text", "block": block,
            "rank": 4, "alpha": 8.0, "parameters": 1000, "in_features": 64, "out_features": 32,
            "reason": "last_n took the last 2 of 4 blocks",
        }
        for block in (2, 3)
    ]  # fmt: skip
    plan = {
        "layers": layers, "trainable_parameters": 2000, "plan_hash": "abc",
        "warnings": ["Limiting text layers to 2 (was 4)"], "dropped": [{}, {}],
    }  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=100).print(render_plan(plan))
    text = out.getvalue()
    assert all(layer["name"] in text for layer in layers)
    assert text.count("last_n took") == 1
    assert "2,000" in text
    assert "warning: Limiting text layers" in text

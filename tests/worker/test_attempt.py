"""What the training process answers, and what it tells meanwhile."""

import io

import pytest

from worker import attempt
from worker.attempt import Beating, StopRequest


def test_a_compression_beats_while_it_is_asked_and_no_oftener_than_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, stop = io.StringIO(), StopRequest()
    stop.has_job = True
    should_stop = Beating(out, stop)
    assert [should_stop() for _ in range(100)] == [False] * 100
    assert out.getvalue() == ""
    monkeypatch.setattr(attempt, "_BEAT_SECONDS", 0.0)
    stop.on_signal(15, None)
    assert should_stop()
    assert out.getvalue() == '{"beat":true}\n'

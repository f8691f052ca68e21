"""Pieces of an answer on their way to a real Valkey."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from grit_core.tools.call_reader import CallPiece
from store.inference import Mailbox
from store.settings import Settings
from tests.ports import reserve_port
from worker.answer_stream import LUMP_SECONDS, AnswerStream, WholeAnswer


@pytest.fixture
def mailbox(embedded_settings: Settings) -> Iterator[Mailbox]:
    made = Mailbox(embedded_settings)
    yield made
    made.close_sync()


def received(mailbox: Mailbox) -> list[dict[str, Any]]:
    found = []
    while (message := mailbox.wait("one", timeout_seconds=0.05)) is not None:
        found.append(message)
    return found


def test_a_piece_after_silence_is_sent_at_once(mailbox: Mailbox) -> None:
    stream = AnswerStream(mailbox, "one")
    stream.add("a")
    assert received(mailbox) == [{"delta": "a", "at": 0}]
    time.sleep(LUMP_SECONDS)
    stream.add("b")
    assert received(mailbox) == [{"delta": "b", "at": 1}]


def test_pieces_that_follow_at_once_are_sent_together(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    lump_seconds = 1.0  # so long that three pieces follow at once on any machine
    monkeypatch.setattr("worker.answer_stream.LUMP_SECONDS", lump_seconds)
    stream = AnswerStream(mailbox, "one")
    for piece in ("first ", "second ", "third"):
        stream.add(piece)
    stream.flush_due()
    assert received(mailbox) == [{"delta": "first ", "at": 0}]
    time.sleep(lump_seconds)
    stream.flush_due()
    assert received(mailbox) == [{"delta": "second third", "at": 6}]
    stream.flush_due()
    assert received(mailbox) == []


def test_a_silent_broker_stops_nothing() -> None:
    mailbox = Mailbox(Settings(broker_url=f"redis://127.0.0.1:{reserve_port()}/0"))
    AnswerStream(mailbox, "one").add("a")
    mailbox.close_sync()


def test_a_whole_answer_says_now_and_then_that_it_grows(mailbox: Mailbox) -> None:
    answer = WholeAnswer(mailbox, "one", every_seconds=0.05)
    answer.add("a")
    assert received(mailbox) == []
    time.sleep(0.05)
    for piece in "bcd":
        answer.add(piece)
    answer.flush_due()
    assert received(mailbox) == [{"delta": "", "at": 0}]


def test_a_silent_broker_stops_no_whole_answer() -> None:
    mailbox = Mailbox(Settings(broker_url=f"redis://127.0.0.1:{reserve_port()}/0"))
    WholeAnswer(mailbox, "one", every_seconds=0).add("a")
    mailbox.close_sync()


def test_pieces_of_calls_say_which_call_and_where(mailbox: Mailbox) -> None:
    stream = AnswerStream(mailbox, "one")
    stream.add("I look.")
    for index, name in enumerate(["look", "look"]):
        stream.add_call(CallPiece(index, name, ""))
        for piece in ('{"a"', ": 1", "}"):
            stream.add_call(CallPiece(index, name, piece))
    time.sleep(LUMP_SECONDS)
    stream.flush_due()
    first, *messages = received(mailbox)
    assert first == {"delta": "I look.", "at": 0}
    for index in (0, 1):
        of_call = [each for each in messages if each["call"] == {"index": index, "name": "look"}]
        assert "".join(each["delta"] for each in of_call) == '{"a": 1}'
        assert of_call[0]["at"] == 0
    assert messages == sorted(messages, key=lambda each: each["call"]["index"])


def test_a_call_is_announced_before_its_arguments_come(mailbox: Mailbox) -> None:
    stream = AnswerStream(mailbox, "one")
    stream.add_call(CallPiece(0, "look", ""))
    call = {"index": 0, "name": "look"}
    assert received(mailbox) == [{"delta": "", "at": 0, "call": call}]

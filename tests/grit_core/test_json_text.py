"""Strict JSON takes a time in proportion to the text, whatever is in it."""

import json
import time

import pytest

from grit_core.json_text import InvalidJson, decode, within


def refused(data: bytes, **bounds: int) -> tuple[str, str]:
    with pytest.raises(InvalidJson) as error:
        decode(data, **bounds)
    return error.value.code, error.value.detail


def test_a_key_that_comes_twice_at_the_end_of_many_is_found_in_one_pass() -> None:
    """Counting each key among all of them would take an hour for this one."""
    pairs = [f'"k{number}":1' for number in range(300_000)]
    started = time.perf_counter()
    code, detail = refused(f"{{{','.join([*pairs, pairs[-1]])}}}".encode())
    assert time.perf_counter() - started < 5
    assert (code, "'k299999'" in detail) == ("json_duplicate_key", True)


@pytest.mark.parametrize(
    "value", [[1] * 99, {f"k{number}": [] for number in range(99)}, [[1] * 40, [1] * 57]]
)
def test_so_many_values_are_read_and_no_more(value: object) -> None:
    data = json.dumps(value).encode()
    assert decode(data, max_values=100) == value
    code, detail = refused(data, max_values=99)
    assert (code, "99" in detail) == ("too_many_values", True)


@pytest.mark.parametrize(
    ("pointer", "cut"),
    [
        ("/content/0/text", "/content"),
        ("/parts/0/text", "/parts/0/text"),
        ("/parts/0/image/url", "/parts/0/image/url"),
        ("/parts/1/text", "/parts/1/text"),
        ("/parts/0/text/0", "/parts/0/text"),
        ("/nothing/0", "/nothing"),
        ("/a~1b/0", "/a~1b"),
        ("/missing/0/x", "/missing/0/x"),
        ("", ""),
    ],
)
def test_a_pointer_leads_into_no_text(pointer: str, cut: str) -> None:
    value = {"content": "Hi", "parts": [{"text": "Hi"}], "nothing": None, "a/b": 1}
    assert within(value, pointer) == cut

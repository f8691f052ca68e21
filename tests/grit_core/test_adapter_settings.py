"""Values of single layers, looked up as PEFT does it and in bounded time."""

import re
import time

from hypothesis import given
from hypothesis import strategies as st

from grit_core.adapter_settings import ByLayer

NAMES = st.text("ab._", min_size=1, max_size=8)
KEYS = st.builds(
    lambda anchor, parts: anchor + "".join(parts),
    st.sampled_from(["", "^"]),
    st.lists(st.sampled_from(["a", "b", "_", ".", r"\.", "a.", r"b\."]), min_size=1, max_size=4),
)


@given(NAMES, st.dictionaries(KEYS, st.integers(1, 9), max_size=5))
def test_the_first_pattern_that_a_name_ends_with_counts(
    name: str, patterns: dict[str, int]
) -> None:
    expected = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), 0
    )
    assert ByLayer(patterns, 0)(name) == expected


def test_keys_that_would_take_a_regex_minutes_take_seconds() -> None:
    """A megabyte of them, of the worst kind: as long as the names' endings, and another at last."""
    started = time.monotonic()
    keys = ["." * 400 + f"{n:04d}x" for n in range(2400)]
    values = ByLayer(dict.fromkeys(keys, 1), 2)
    for layer in range(100):
        name = "a." * 250 + f"{layer:04d}y"
        assert name[-406] == "."
        assert values(name) == 2
    assert time.monotonic() - started < 10

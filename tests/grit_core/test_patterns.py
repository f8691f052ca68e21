import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.patterns import MAX_PATTERN_LENGTH, matches, matching, pattern_fault

Q_PROJ = "model.vision_model.encoder.layers.11.self_attn.q_proj"


def slow_matches(pattern: str, name: str) -> bool:
    """The definition, character by character, with all the backtracking it takes."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        skips = (name[count:] for count in range(len(name) + 1) if "." not in name[:count])
        return any(slow_matches(pattern[1:], rest) for rest in skips)
    return bool(name) and pattern[0] == name[0] and slow_matches(pattern[1:], name[1:])


@given(pattern=st.text("ab.*", max_size=9), name=st.text("ab.", max_size=9))
def test_matching_agrees_with_its_definition(pattern: str, name: str) -> None:
    assert matches(pattern, name) == slow_matches(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.vision_model.encoder.layers.*.self_attn.q_proj", Q_PROJ, True),
        ("model.vision_model.encoder.layers.*.self_attn.*_proj", Q_PROJ, True),
        ("model.vision_model.encoder.*.q_proj", Q_PROJ, False),
        ("*", Q_PROJ, False),
        ("q_proj", Q_PROJ, False),
        ("*", "lm_head", True),
        ("model.multi_modal_projector.*", "model.multi_modal_projector.linear_1", True),
        ("model.multi_modal_projector.*", "model.multi_modal_projector", False),
        ("layers.1.q", "layers.11.q", False),
    ],
)
def test_a_star_stops_at_a_dot_and_the_whole_name_counts(
    pattern: str, name: str, expected: bool
) -> None:
    assert matches(pattern, name) is expected


def test_a_hostile_pattern_costs_no_more_than_a_plain_one() -> None:
    pattern, name = "*a" * (MAX_PATTERN_LENGTH // 2), "a" * 2_000 + "b"
    started_at = time.perf_counter()
    assert not matches(pattern, name)
    assert time.perf_counter() - started_at < 0.1


@given(st.lists(st.text("ab.*", min_size=1, max_size=6), max_size=4))
def test_matching_many_names_is_matching_each(patterns: list[str]) -> None:
    names = ["a", "a.b", "ab.ba", "a.a.b", "b.b"]
    found = matching(patterns, names)
    assert list(found) == [name for name in names if any(matches(p, name) for p in patterns)]
    assert all(matches(pattern, name) for name, pattern in found.items())


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("", "out_of_range"),
        ("a" * (MAX_PATTERN_LENGTH + 1), "out_of_range"),
        ("model.**.q_proj", "invalid_pattern"),
        ("model.layers.[0-9].q_proj", "invalid_pattern"),
        ("model..q_proj", "invalid_pattern"),
        (".q_proj", "invalid_pattern"),
        ("model.\ud800", "invalid_pattern"),
        ("model.layers.0\n", "invalid_pattern"),
        (7, "wrong_type"),
        (None, "wrong_type"),
    ],
)
def test_a_pattern_without_meaning_is_refused_with_its_reason(pattern: object, code: str) -> None:
    fault = pattern_fault(pattern, pointer="/config/vision/layer_patterns/3")
    assert fault is not None
    assert (fault.code, fault.pointer) == (code, "/config/vision/layer_patterns/3")
    assert fault.detail.isascii()


def test_the_patterns_of_the_guide_are_accepted() -> None:
    for pattern in (
        "model.vision_model.encoder.layers.*.self_attn.q_proj",
        "model.text_model.layers.*.self_attn.*_proj",
        "model.multi_modal_projector.*",
    ):
        assert pattern_fault(pattern, pointer="") is None

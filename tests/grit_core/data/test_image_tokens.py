"""What is known of a row's length before its images are decoded, and from when on."""

from typing import Any

import pytest

from grit_core.data.image_tokens import SLACK_TOKENS, ImageTokens, Sizes

SMALL: Sizes = ((32, 16),)
LARGE: Sizes = ((64, 48),)
WIDE: Sizes = ((96, 16),)
TWO: Sizes = ((32, 16), (64, 48))


class Patches:
    """A processor that makes a token of every 8 by 8 patch, and says `error` more or less."""

    def __init__(self, *, error: int = 0) -> None:
        self.error = error

    def _get_num_multimodal_tokens(self, *, image_sizes: list[list[int]]) -> dict[str, Any]:
        return {"num_image_tokens": [patches((w, h)) + self.error for h, w in image_sizes]}


def patches(size: tuple[int, int]) -> int:
    return (size[0] // 8) * (size[1] // 8)


def length(num_plain: int, sizes: Sizes) -> int:
    """Tokens of a row, its placeholders replaced by the patches."""
    return num_plain + sum(patches(size) - 1 for size in sizes)


def test_a_processor_is_believed_after_rows_of_three_sizes_agree_with_it() -> None:
    tokens = ImageTokens(Patches(error=-2))  # it leaves the two tokens around an image out
    for sizes in (SMALL, LARGE, WIDE):
        assert tokens.bounds(20, sizes) is None
        tokens.learn(20, sizes, num_tokens=length(20, sizes))
    other: Sizes = ((800, 80),)
    expected = length(50, other)
    assert tokens.bounds(50, other) == (expected - SLACK_TOKENS, expected + SLACK_TOKENS)


def test_rows_of_one_size_need_a_single_comparison() -> None:
    tokens = ImageTokens(Patches())
    tokens.learn(20, SMALL, num_tokens=length(20, SMALL))
    assert tokens.bounds(20, SMALL) is not None
    assert tokens.bounds(20, LARGE) is None


def test_each_number_of_images_is_compared_for_itself() -> None:
    tokens = ImageTokens(Patches())
    for sizes in (SMALL, LARGE, WIDE):
        tokens.learn(20, sizes, num_tokens=length(20, sizes))
    assert tokens.bounds(20, TWO) is None


def test_a_processor_whose_numbers_are_wrong_is_not_believed() -> None:
    class Constant(Patches):
        def _get_num_multimodal_tokens(self, *, image_sizes: list[list[int]]) -> dict[str, Any]:
            return {"num_image_tokens": [7] * len(image_sizes)}

    tokens = ImageTokens(Constant())
    tokens.learn(20, SMALL, num_tokens=length(20, SMALL))
    tokens.learn(20, LARGE, num_tokens=length(20, LARGE))
    assert tokens.bounds(20, LARGE) is not None
    assert tokens.bounds(20, ((640, 480),)) is None


@pytest.mark.parametrize("fault", [AttributeError, KeyError, TypeError, NotImplementedError])
def test_a_processor_that_cannot_say_is_known_by_the_sizes_it_has_seen(
    fault: type[Exception],
) -> None:
    class Broken(Patches):
        def _get_num_multimodal_tokens(self, *, image_sizes: list[list[int]]) -> dict[str, Any]:
            raise fault(image_sizes)

    for processor in (Broken(), object()):
        tokens = ImageTokens(processor)
        assert tokens.bounds(20, TWO) is None
        tokens.learn(20, TWO, num_tokens=length(20, TWO))
        expected = length(31, TWO)
        assert tokens.bounds(31, TWO) == (expected - 2 * SLACK_TOKENS, expected + 2 * SLACK_TOKENS)
        assert tokens.bounds(31, SMALL) is None

"""Each message of docs/troubleshooting.md is one that the service says."""

import re
from typing import Final

import pytest

from api.errors import KINDS
from tests.docs.messages import can_be_said
from tests.docs.pages import load

PAGE: Final = load("docs/troubleshooting.md")
ENTRIES: Final = re.findall(r"^### (.+)\n\n((?:(?!^##).*\n)+)", PAGE, re.MULTILINE)
MESSAGES: Final = [
    found[1]
    for heading, _ in ENTRIES
    if (found := re.fullmatch(r"`([^`]+)`", heading)) and not found[1].startswith("make ")
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_can_be_said(message: str) -> None:
    if re.fullmatch(r"\w+", message):
        assert message in KINDS or can_be_said(message), f"the service has no code {message}"
    else:
        assert can_be_said(message), f"no text of the code is {message!r}; has it changed?"


def test_every_entry_says_what_to_do() -> None:
    assert len(ENTRIES) >= 20
    for heading, text in ENTRIES:
        assert len(text.split()) >= 10, heading


def test_no_message_is_explained_twice() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_a_message_that_nothing_says_is_found() -> None:
    assert not can_be_said("The flux capacitor ... is empty")
    assert can_be_said("The API key is unknown, revoked or expired.")

from hypothesis import given
from hypothesis import strategies as st

from grit_client.event_stream import Message, parse


def test_fields_comments_and_blank_lines_are_read_as_the_standard_says() -> None:
    lines = [
        ": heartbeat", "", "retry: 2000", "", "id: 1", "event: progress", 'data: {"step": 3}', "",
        "data: two", "data:lines", "", ":", "id: 3", "", "data: ends without a blank line",
    ]  # fmt: skip
    assert list(parse(lines)) == [
        Message(id="1", event="progress", data={"step": 3}),
        Message(id="1", event="message", data="two\nlines"),
    ]


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\r\n"), max_size=20)))
def test_no_line_breaks_the_reader(lines: list[str]) -> None:
    for message in parse(lines):
        assert message.event

"""What an inference request may show."""

from typing import Any

import pytest

from api.intake.conversation import Conversation, names_urls
from api.intake.remote_images import RemoteImages
from api.schemas.infer import InferRequest
from grit_core.images import data_url
from tests.api.conftest import MODEL, Team, png


def ask(team: Team, **body: Any) -> tuple[int, list[tuple[str, str]]]:
    answer = team.post("/infer", json={"model": MODEL, **body})
    faults = [(item["code"], item.get("pointer")) for item in answer.json().get("errors", [])]
    return answer.status_code, faults


def turn(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, *parts]}]}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_images_that_are_too_many_pixels_together_are_refused(team: Team) -> None:
    large = data_url(png(4500))  # 20 megapixels each
    status, faults = ask(team, prompt="?", images=[large] * 3)
    assert (status, faults) == (422, [("request_too_large", "/images")])
    assert ask(team, prompt="?", images=[large] * 2)[1] == []


def test_images_beyond_the_bound_of_all_together_are_not_decoded(team: Team) -> None:
    large = png(4500)
    cut = data_url(large[:-2000])
    assert ask(team, prompt="?", images=[cut])[1] == [("image_corrupt", "/images/0")]
    both = [data_url(large)] * 2
    assert ask(team, prompt="?", images=[*both, cut])[1] == [("request_too_large", "/images")]


def test_urls_are_told_from_images_that_came_along() -> None:
    def named(**fields: Any) -> bool:
        return names_urls(InferRequest.model_validate({"model": MODEL, **fields}))

    here, there = data_url(png()), "https://images.example.com/a.png"
    assert not named(prompt="?", images=[here])
    assert named(prompt="?", images=[here, there])
    assert not named(**turn(image(here)))
    assert named(**turn(image(here), image(there)))


def test_too_many_images_are_refused_before_any_is_looked_at(team: Team) -> None:
    status, faults = ask(team, **turn(*[image("data:broken")] * 9))
    assert (status, faults) == (422, [("request_too_large", "/messages")])


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,!!!", "image_corrupt"),
        (data_url(png())[:-30], "image_corrupt"),
        ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "image_format_not_allowed"),
        ("data:image/png;base64,R0lGODlhAQABAAAAACw=", "image_format_not_allowed"),
        ("data:image/png;base64,PHN2Zy8+", "image_format_not_allowed"),
        ("https://example.com/a.png", "image_url_not_allowed"),
        ("file:///etc/passwd", "image_url_not_allowed"),
    ],
)
def test_an_image_that_is_none_is_named_by_its_place(team: Team, url: str, code: str) -> None:
    status, faults = ask(team, **turn(image(url)))
    assert (status, faults) == (422, [(code, "/messages/0/content/1")])


def test_every_image_that_is_wrong_is_named_in_one_answer(team: Team) -> None:
    body = turn(image("data:broken"), {"type": "image"}, image("https://example.com/a.png"))
    assert ask(team, **body)[1] == [
        ("image_corrupt", "/messages/0/content/1"),
        ("image_count_mismatch", "/messages/0/content/2"),
        ("image_url_not_allowed", "/messages/0/content/3"),
    ]


# --- system messages


HELLO: dict[str, Any] = {"role": "user", "content": "Which digit is this?"}


def canonical(*messages: dict[str, Any]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    body = InferRequest.model_validate({"model": MODEL, "messages": messages})
    conversation = Conversation(body, remote=RemoteImages([], seconds=1))
    return conversation.messages(), conversation.places


def test_system_messages_are_joined_with_blank_lines_between_them() -> None:
    parts = [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]
    systems = [{"role": "system", "content": content} for content in ("A", "", parts)]
    messages, places = canonical(*systems, HELLO)
    assert messages[0] == {"role": "system", "content": [{"type": "text", "text": "A\n\nBC"}]}
    assert places == ("/messages/2", "/messages/3")


def test_one_system_message_stays_as_it_is() -> None:
    parts = [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]
    messages, places = canonical({"role": "system", "content": parts}, HELLO)
    assert messages[0]["content"] == parts
    assert places == ("/messages/0", "/messages/1")


def test_a_late_system_message_is_refused_with_the_reason(team: Team) -> None:
    late = [HELLO, {"role": "assistant", "content": None}, {"role": "system", "content": "A"}]
    answer = team.post("/infer", json={"model": MODEL, "messages": [*late, HELLO]})
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert fault["pointer"] == "/messages/2/role"
    assert "comes first" in fault["detail"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "a message of the user has a text or an image"),
        ("", "a message of the user has a text or an image"),
        ([], "a message of the user has a text or an image"),
        ({"a": 1}, "`content` is an object; give a text or a list of parts"),
        (5, "`content` is 5; give a text or a list of parts"),
    ],
)
@pytest.mark.parametrize("path", ["/infer", "/v1/chat/completions"])
def test_a_content_that_is_none_says_what_it_may_be(
    team: Team, path: str, content: Any, words: str
) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    answer = team.post(path, json=body).json()
    assert words in (answer["error"]["message"] if "error" in answer else answer["detail"])

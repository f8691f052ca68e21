"""OpenAI's clients at another base URL are shown the right one."""

import httpx
import openai
import pytest
from openai import OpenAI

from tests.api.openai.conftest import HELLO, Server

BASES = ["", "/v1/v1", "/openai/v1", "/api/v1", "/api"]


@pytest.fixture(params=BASES)
def lost(request: pytest.FixtureRequest, server: Server, team: str) -> OpenAI:
    """OpenAI's client with a base URL that is not the service's."""
    base_url = server.url + request.param
    return server.client(team).with_options(base_url=base_url)


def test_the_clients_own_error_says_what_the_base_url_is(lost: OpenAI) -> None:
    wanted = r"base_url that ends in /v1, once: this request is then for /v1/"
    with pytest.raises(openai.NotFoundError, match=f"{wanted}chat/completions") as refused:
        lost.chat.completions.create(model="m", messages=HELLO)
    assert (refused.value.code, refused.value.type) == ("not_found", "invalid_request_error")
    for ask in (
        lost.models.list,
        lost.files.list,
        lost.fine_tuning.jobs.list,
        lambda: lost.models.retrieve("m"),
        lambda: lost.embeddings.create(model="m", input="x"),
        lambda: lost.completions.create(model="m", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError, match=wanted):
            ask()


def test_what_openai_has_and_this_service_has_not_is_told_with_what_there_is(
    client: OpenAI,
) -> None:
    there_is = "there are /v1/chat/completions, /v1/models, /v1/files and /v1/fine_tuning/jobs"
    for ask, instead in (
        (lambda: client.completions.create(model="m", prompt="x"), "ask POST /v1/chat"),
        (lambda: client.responses.create(model="m", input="x"), "ask POST /v1/chat"),
        (lambda: client.embeddings.create(model="m", input="x"), "make no embeddings"),
        (client.batches.list, "several at a time"),
        (client.vector_stores.list, there_is),
    ):
        with pytest.raises(openai.NotFoundError, match=instead) as refused:
            ask()
        assert there_is in refused.value.message


def test_the_list_of_models_is_ours_for_everyone_else(server: Server) -> None:
    headers = {"Authorization": f"Bearer {server.key('any')}"}
    assert httpx.get(f"{server.url}/models", headers=headers).json()["data"][0]["links"]
    unknown = httpx.get(f"{server.url}/chat", headers=headers).json()
    assert unknown["error"]["code"] == "not_found"
    assert httpx.get(f"{server.url}/nothing", headers=headers).json()["code"] == "not_found"

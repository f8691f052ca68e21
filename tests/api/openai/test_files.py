"""Datasets as files."""

import json
from itertools import islice

import openai
import pytest
from openai import OpenAI

from api.openai.files import without_blank_lines
from store.keys import Scope
from tests.api.conftest import job_body, row, rows
from tests.api.openai.conftest import Server


def test_a_file_is_uploaded_listed_read_and_deleted(client: OpenAI) -> None:
    made = client.files.create(file=("invoices.jsonl", rows(3)), purpose="fine-tune")
    assert (made.filename, made.purpose, made.status) == (
        "invoices.jsonl",
        "fine-tune",
        "processed",
    )
    assert made.bytes > 0
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id).id == made.id
    lines = client.files.content(made.id).text.splitlines()
    assert [json.loads(line)["messages"][1]["content"][0]["text"] for line in lines] == [
        *("0", "1", "2")
    ]
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve(made.id)
    assert refused.value.code == "not_found"


def test_a_file_is_a_dataset(server: Server, team: str, client: OpenAI) -> None:
    import httpx  # noqa: PLC0415 - asks the root paths of the same service

    made = client.files.create(file=rows(2), purpose="fine-tune")
    headers = {"Authorization": f"Bearer {server.key(team, Scope.READ)}"}
    found = httpx.get(f"{server.url}/datasets/{made.id}", headers=headers).json()
    assert (found["id"], found["num_rows"]) == (made.id, 2)


def test_a_list_is_paged_to_its_end(client: OpenAI) -> None:
    made = [client.files.create(file=rows(each), purpose="fine-tune").id for each in (1, 2, 3)]
    first = client.files.list(limit=2)
    assert ([file.id for file in first.data], first.has_more) == ([made[2], made[1]], True)
    assert [file.id for file in islice(first, 10)] == made[::-1]
    assert list(client.files.list(purpose="batch")) == []


def test_bad_rows_are_refused_with_their_lines(client: OpenAI) -> None:
    bad = json.dumps({"messages": [{"role": "user", "content": "no answer"}]}).encode()
    with pytest.raises(openai.BadRequestError, match="Line 2: No message is the assistant") as seen:
        client.files.create(file=rows(1) + bad, purpose="fine-tune")
    assert (seen.value.code, seen.value.param) == ("dataset_rejected", "file")
    (kept,) = client.files.list()
    assert kept.status == "error"
    assert f"/datasets/{kept.id}/report" in str(seen.value)
    with pytest.raises(openai.ConflictError):
        client.files.content(kept.id)


def test_bad_rows_can_be_left_out(client: OpenAI) -> None:
    bad = json.dumps(row(image="data:image/png;base64,AAAA")).encode()
    made = client.files.create(
        file=rows(1) + bad, purpose="fine-tune", extra_body={"on_bad_rows": "skip"}
    )
    assert len(client.files.content(made.id).text.splitlines()) == 1


def test_lines_that_were_left_out_are_no_lines_of_the_content(client: OpenAI) -> None:
    made = client.files.create(file=b"\n\n" + rows(1) + b"\n \n" + rows(2), purpose="fine-tune")
    lines = client.files.content(made.id).text.split("\n")
    assert [bool(line) for line in lines] == [True, True, True, False]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_blank_lines_are_left_out_wherever_a_chunk_ends(size: int) -> None:
    stored = b"\n\n\n{a}\n\n{b}\n{c}\n\n\n\n{d}\n"
    chunks = [stored[at : at + size] for at in range(0, len(stored), size)]
    assert b"".join(without_blank_lines(chunks)) == b"{a}\n{b}\n{c}\n{d}\n"


def test_another_purpose_and_an_expiry_are_refused_by_name(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=rows(1), purpose="batch")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(
            file=rows(1),
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "expires_after")
    assert not list(client.files.list())


def test_an_upload_beyond_the_bound_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=b"x" * 2_100_000, purpose="fine-tune")
    assert (refused.value.status_code, refused.value.code) == (413, "upload_too_large")


def test_a_file_that_a_job_names_stays(client: OpenAI) -> None:
    made = client.files.create(file=rows(4), purpose="fine-tune").id
    client.fine_tuning.jobs.create(model=job_body(made)["model"], training_file=made)
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(made)
    assert refused.value.code == "still_referenced"


def test_an_order_that_we_do_not_have_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(order="asc")
    assert refused.value.param == "order"


def test_an_after_that_is_no_file_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.list(after="file-abc")
    assert refused.value.param == "after"


def test_another_teams_file_is_not_there(server: Server, client: OpenAI) -> None:
    foreign = server.client("someone-else").files.create(file=rows(1), purpose="fine-tune").id
    for act in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            act(foreign)
    assert foreign not in {file.id for file in client.files.list()}

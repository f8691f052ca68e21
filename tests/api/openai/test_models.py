"""Base models and adapters as models."""

import openai
import pytest
from openai import OpenAI

from store import adapters, base_models, keys
from store.database import transaction
from store.models import AdapterOrigin
from tests.api.conftest import MODEL
from tests.api.openai.conftest import Server


def adapter_of(server: Server, team: str, **fields: str) -> str:
    with transaction(server.services.engine) as session:
        keys.ensure_team(session, team)
        made = adapters.create_adapter(
            session, team=team, origin=AdapterOrigin.IMPORT, model=MODEL, prefix="x/", **fields
        )
    return made.id


def test_base_models_and_the_teams_adapters_are_listed(
    server: Server, team: str, client: OpenAI
) -> None:
    adapter = adapter_of(server, team, name="invoices")
    foreign = adapter_of(server, "someone-else")
    found = {model.id: model for model in client.models.list()}
    assert found[MODEL].owned_by == "grit"
    assert found[adapter].owned_by == team
    assert foreign not in found
    assert found[adapter].object == "model"
    assert found[adapter].created > 1_700_000_000
    facts = client.models.retrieve(adapter).to_dict()["grit"]
    assert facts == {"base_model": MODEL, "name": "invoices", "job": None}


def test_the_name_of_an_adapter_is_answered_with_its_id(
    server: Server, team: str, client: OpenAI
) -> None:
    adapter = adapter_of(server, team, name="receipts")
    adapter_of(server, "someone-else", name="theirs")
    with pytest.raises(
        openai.NotFoundError, match=f"the name of an adapter; send its id: {adapter}"
    ):
        client.models.retrieve("receipts")
    with pytest.raises(openai.NotFoundError, match="Registered: ") as refused:
        client.models.retrieve("theirs")
    assert "name of an adapter" not in str(refused.value)


def test_more_adapters_than_a_page_are_all_listed(
    server: Server, team: str, client: OpenAI
) -> None:
    made = {adapter_of(server, team) for _ in range(201)}
    assert made <= {model.id for model in client.models.list()}


@pytest.mark.parametrize("name", [MODEL, "/models/a folder"])
def test_a_base_model_is_retrieved_whatever_its_name(
    server: Server, client: OpenAI, name: str
) -> None:
    with transaction(server.services.engine) as session:
        if name != MODEL:
            base_models.register(session, id=name, source=name)
            base_models.save_inventory(session, id=name, inventory={}, inventory_hash="0")
    assert client.models.retrieve(name).id == name


def test_a_model_that_is_not_ready_is_not_there(server: Server, client: OpenAI) -> None:
    with transaction(server.services.engine) as session:
        base_models.register(session, id="tests/new", source="tests/new")
    assert "tests/new" not in {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("tests/new")
    assert refused.value.code == "model_not_found"


def test_an_adapter_is_deleted_as_a_model(server: Server, team: str, client: OpenAI) -> None:
    adapter = adapter_of(server, team)
    assert client.models.delete(adapter).to_dict() == {
        "id": adapter,
        "object": "model",
        "deleted": True,
    }
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(adapter)


def test_a_base_model_is_not_deleted(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="only adapters"):
        client.models.delete(MODEL)
    assert client.models.retrieve(MODEL)


def test_another_teams_adapter_can_be_neither_seen_nor_deleted(
    server: Server, client: OpenAI
) -> None:
    foreign = adapter_of(server, "someone-else")
    for act in (client.models.retrieve, client.models.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            act(foreign)
        assert refused.value.code == "model_not_found"
    assert server.client("someone-else").models.retrieve(foreign)

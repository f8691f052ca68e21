"""What a dataset's images and columns mean for the plan and the job that name it."""

from dataclasses import replace
from typing import Any

import pytest

from api.services import Services
from grit_core.config.model_configs import Modality
from grit_core.inventory import LayerRecord
from store import base_models, datasets
from store.database import transaction
from tests.api.conftest import Team, job_body, row, rows, tiny_inventory
from tests.api.test_datasets import jsonl, refused, zipped

TEXT_MODEL = "tests/tiny-text"


def text_rows(**columns: Any) -> bytes:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return jsonl(*[{"messages": messages, **columns}] * 4)


def upload(team: Team, data: bytes, **fields: str) -> str:
    answer = team.upload(data, **fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def text_model(services: Services) -> str:
    layers = [
        LayerRecord(
            name=f"model.layers.{block}.self_attn.{name}_proj",
            modality=Modality.TEXT,
            block=block,
            in_features=128,
            out_features=128,
        )
        for block in range(2)
        for name in ("q", "k", "v")
    ]
    inventory = replace(
        tiny_inventory(),
        model_type="llama",
        architecture="LlamaForCausalLM",
        layers=tuple(layers),
        family="llama",
    )
    with transaction(services.engine) as session:
        base_models.register(session, id=TEXT_MODEL, source="/models/text")
        base_models.save_inventory(
            session, id=TEXT_MODEL, inventory=inventory.to_json(), inventory_hash=inventory.hash
        )
    return TEXT_MODEL


def text_body(model: str, dataset: str, **fields: Any) -> dict[str, Any]:
    config = {"text": {"layer_patterns": ["model.layers.*.self_attn.*"], "rank": 4}}
    return {"model": model, "dataset": dataset, "config": config, **fields}


def test_layers_that_read_images_are_named_where_no_row_has_one(team: Team) -> None:
    body = job_body(upload(team, text_rows()))
    planned = team.post("/jobs/plan", json=body).json()
    [warning] = planned["warnings"]
    assert "no image" in warning
    assert "vision" in warning
    job = team.post("/jobs", json={**body, "plan_hash": planned["plan_hash"]})
    assert job.status_code == 201, job.text
    assert job.json()["plan"]["warnings"] == [warning]
    assert team.get(f"/jobs/{job.json()['id']}").json()["plan"]["warnings"] == [warning]
    [listed] = team.get("/jobs").json()["data"]
    assert listed["plan"]["warnings"] == [warning]
    manifest = team.get(f"/jobs/{job.json()['id']}/manifest").json()
    assert manifest["plan"]["warnings"] == [warning]


def test_a_plan_with_images_or_without_layers_for_them_has_no_warning(team: Team) -> None:
    seen = job_body(upload(team, rows(4)))
    assert team.post("/jobs/plan", json=seen).json()["warnings"] == []
    config = {"text": {"n_layers": 2, "rank": 4}, "vision": None, "cross_modal": None}
    text_only = job_body(upload(team, text_rows()), config=config)
    planned = team.post("/jobs/plan", json=text_only).json()
    assert {layer["modality"] for layer in planned["layers"]} == {"text"}
    assert planned["warnings"] == []


def test_columns_that_are_not_read_are_named_in_the_plan_and_the_job(team: Team) -> None:
    data = jsonl(*[{**row(), "id": 1, "source": "web"}] * 4)
    body = job_body(upload(team, data))
    expected = ["The dataset has columns that are not read: id, source."]
    assert team.post("/jobs/plan", json=body).json()["warnings"] == expected
    assert team.post("/jobs", json=body).json()["plan"]["warnings"] == expected


@pytest.mark.parametrize("name", ["dataset", "eval_dataset", "retention_dataset"])
def test_a_text_model_refuses_a_dataset_with_images(team: Team, text_model: str, name: str) -> None:
    text, seen = upload(team, text_rows()), upload(team, rows(4))
    good = team.post("/jobs/plan", json=text_body(text_model, text))
    assert (good.status_code, good.json().get("warnings")) == (200, [])
    body = {**text_body(text_model, text), name: seen}
    for path in ("/jobs/plan", "/jobs"):
        problem = refused(team.post(path, json=body), 422, "images_not_supported")
        [fault] = problem["errors"]
        assert fault["pointer"] == f"/{name}"
        assert "images (4)" in fault["detail"]
        assert "LlamaForCausalLM" in fault["detail"]


def test_what_is_wrong_with_images_comes_with_all_other_faults(team: Team, text_model: str) -> None:
    body = text_body(text_model, upload(team, rows(4)), text_layers=["nowhere"])
    problem = refused(team.post("/jobs/plan", json=body), 422, "images_not_supported")
    assert {fault["pointer"] for fault in problem["errors"]} == {"/dataset", "/text_layers/0"}


def test_a_dataset_knows_the_name_of_its_file(team: Team, services: Services) -> None:
    plain = team.upload(rows(1), filename="r\u00f6ws.jsonl").json()
    packed = team.upload(zipped({"set/rows.jsonl": rows(1)}), filename="set.zip").json()
    assert plain["details"]["file_name"] == "r\u00f6ws.jsonl"
    assert (packed["details"]["file_name"], packed["details"]["rows_file"]) == (
        "set.zip",
        "set/rows.jsonl",
    )
    with transaction(services.engine) as session:
        names = [
            datasets.source_name(datasets.get_dataset(session, made["id"], team=team.name))
            for made in (plain, packed)
        ]
        bare = datasets.create_dataset(
            session, team=team.name, status=datasets.DatasetStatus.READY, name="mine"
        )
        names += [datasets.source_name(bare)]
        bare.name = None
        names += [datasets.source_name(bare)]
        assert names == ["r\u00f6ws.jsonl", "set/rows.jsonl in set.zip", "mine", bare.id]
        session.rollback()

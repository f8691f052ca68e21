"""All faults of a job's request come in one answer: of shape, of content, behind each other."""

from typing import Any

import pytest

from api.services import Services
from store.ids import new_id
from tests.api.conftest import MODEL, Team, job_body, rows


def faults(team: Team, body: Any, path: str = "/jobs") -> dict[str, dict[str, Any]]:
    answer = team.post(path, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] == "request_invalid"
    errors = answer.json()["errors"]
    found = {error["pointer"]: error for error in errors}
    assert len(found) == len(errors)  # each place once
    return found


@pytest.mark.parametrize("path", ["/jobs", "/jobs/plan"])
def test_faults_of_shape_and_of_content_come_in_one_answer(team: Team, path: str) -> None:
    body = {
        "model": "nowhere/model",
        "dataset": "ds_nowhere",
        "eval_dataset": 7,
        "preset": "smolvlm_fats",
        "device": "tpu",
        "priority": "high",
        "nmae": "mine",
        "training": {"lr": 1, "epochs": 0, "batch_size": "8"},
        "config": {"text": {"rank": 0, "rnk": 4}, "visoin": {}},
    }
    found = faults(team, body, path)
    assert set(found) == {
        *("/model", "/dataset", "/eval_dataset", "/preset", "/device", "/priority", "/nmae"),
        *("/training/lr", "/training/epochs", "/training/batch_size"),
        *("/config/text/rank", "/config/text/rnk", "/config/visoin"),
    }
    order = [pointer.split("/")[1] for pointer in found]
    assert sorted(order, key=list(body).index) == order


def test_a_pattern_that_fits_nothing_is_found_behind_other_faults(team: Team) -> None:
    body = job_body("ds_nowhere", text_layers=["nope.*"], training={"epochs": 0, "lr": 1})
    body["config"] = {"visoin": {}}
    assert set(faults(team, body)) == {
        *("/dataset", "/text_layers/0", "/training/epochs", "/training/lr", "/config/visoin"),
    }
    del body["training"], body["config"]
    assert set(faults(team, body)) == {"/dataset", "/text_layers/0"}


def test_a_configuration_that_is_a_list_is_called_one(team: Team) -> None:
    for wrong in ([], [1]):
        found = faults(team, job_body(team.dataset(), config=wrong))
        assert "give an object" in found["/config"]["detail"]


def test_names_of_peft_and_transformers_lead_to_ours(team: Team) -> None:
    body = job_body(team.dataset(), lora_alpha=16, target_modules=["q_proj"], lr=1e-4)
    found = faults(team, body)
    assert "Did you mean alpha in a modality of `config`" in found["/lora_alpha"]["detail"]
    assert "Did you mean layer_patterns in" in found["/target_modules"]["detail"]
    assert found["/lr"]["detail"].endswith("Did you mean learning_rate in `training`?")


def test_a_truth_value_is_shown_as_json_writes_it(team: Team) -> None:
    found = faults(team, job_body(team.dataset(), training={"epochs": True}))
    assert found["/training/epochs"]["detail"].startswith("epochs is true; ")


def test_what_only_stands_in_the_way_is_no_fault(team: Team) -> None:
    wrong = job_body(team.dataset(), preset="smolvlm_fats")
    assert set(faults(team, wrong)) == {"/preset"}
    strategy = {"config": {"text": {"strategy": "frist_n", "n_layers": 2}}}
    assert set(faults(team, job_body(team.dataset(), **strategy))) == {"/config/text/strategy"}


@pytest.mark.parametrize(
    ("fields", "pointer", "meant"),
    [
        ({"training": {"lr": 0.1}}, "/training/lr", "Did you mean learning_rate?"),
        ({"training": {"num_train_epochs": 1}}, "/training/num_train_epochs", "mean epochs?"),
        ({"config": {"text": {"r": 8}}}, "/config/text/r", "Did you mean rank?"),
        ({"config": {"lora_alpha": 8}}, "/config/lora_alpha", "Did you mean global_alpha?"),
        ({"config": {"language": {}}}, "/config/language", "Did you mean text?"),
        ({"epochs": 3}, "/epochs", "it belongs in `training`"),
        ({"rank": 3}, "/rank", "it belongs in a modality of `config`"),
        ({"nmae": "x"}, "/nmae", "Did you mean name?"),
        ({"zzz": 1}, "/zzz", "Known fields: model, dataset"),
        ({"training": {"precision": "bf16"}}, "/training/precision", "Did you mean bfloat16?"),
    ],
)
def test_an_unknown_field_is_answered_with_the_one_that_was_meant(
    team: Team, fields: dict[str, Any], pointer: str, meant: str
) -> None:
    assert meant in faults(team, job_body(team.dataset(), **fields))[pointer]["detail"]


def test_other_bodies_name_the_nearest_field_too(team: Team) -> None:
    answer = team.post("/infer", json={"model": MODEL, "promt": "?", "max_tokens": 5})
    details = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert "Did you mean prompt?" in details["/promt"]
    assert "Did you mean max_new_tokens?" in details["/max_tokens"]
    answer = team.post("/models", json={"id": "x", "sorce": "y"})
    details = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert "Did you mean source?" in details["/sorce"]
    turn = {"role": "user", "content": [{"type": "text", "txt": "?"}]}
    answer = team.post("/infer", json={"model": MODEL, "messages": [turn]})
    details = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert "Did you mean text?" in details["/messages/0/content/0/txt"]


def test_a_value_a_bound_and_a_choice_are_named(team: Team) -> None:
    body = {"model": MODEL, "prompt": "?", "temperature": 3, "max_new_tokens": "5", "seed": -1}
    answer = team.post("/infer", json=body)
    details = {error["pointer"]: error["detail"] for error in answer.json()["errors"]}
    assert details == {
        "/temperature": "`temperature` is 3; give a number of at most 2.0.",
        "/max_new_tokens": "`max_new_tokens` is '5'; give a whole number.",
        "/seed": "`seed` is -1; give a number of at least 0.",
    }
    answer = team.get("/jobs?status=runing")
    assert "Did you mean running?" in answer.json()["errors"][0]["detail"]


def test_an_adapter_or_a_name_in_the_wrong_place_is_recognised(team: Team) -> None:
    found = faults(team, job_body(team.dataset(), model=new_id("adp")))
    assert "is the id of an adapter" in found["/model"]["detail"]
    dataset = team.upload(rows(3), name="words").json()["id"]
    assert dataset in faults(team, job_body("words"))["/dataset"]["detail"]
    assert (
        f"the nearest by name: `words` ({dataset})."
        in (faults(team, job_body("wrods"))["/dataset"]["detail"])
    )
    assert "upload the file first" in faults(team, job_body("rows.jsonl"))["/dataset"]["detail"]


def test_a_name_of_another_team_is_not_given_away(team: Team, join: Any) -> None:
    other = join("other")
    dataset = other.upload(rows(3), name="secret").json()["id"]
    detail = faults(team, job_body("secret"))["/dataset"]["detail"]
    assert dataset not in detail
    assert "see GET /datasets" in detail


def test_a_faulty_request_makes_no_model_known(team: Team, services: Services) -> None:
    faults(team, job_body("ds_nowhere", model="allowed/thing", priority="high"))
    assert "allowed/thing" not in {model["id"] for model in team.get("/models").json()["data"]}
    assert services


def test_gpu_means_cuda(team: Team) -> None:
    for device in ("gpu", "GPU", "cuda"):
        detail = faults(team, job_body(team.dataset(), device=device))["/device"]["detail"]
        assert "The device cuda is not available" in detail
    assert team.get("/jobs?device=gpu").json()["data"] == []


def test_a_list_is_narrowed_to_a_name(team: Team, join: Any) -> None:
    dataset = team.upload(rows(3), name="grey").json()["id"]
    wanted = team.job(dataset=dataset, name="wanted")["id"]
    team.job(dataset=dataset, name="other")
    join("other").job(name="wanted")
    assert [job["id"] for job in team.get("/jobs?name=wanted").json()["data"]] == [wanted]
    assert team.get("/jobs?name=wante").json()["data"] == []
    named = team.get("/datasets?name=grey").json()["data"]
    assert {each["id"] for each in named} == {dataset}
    for path in ("/jobs", "/datasets", "/adapters"):
        assert team.get(f"{path}?name=none").json()["data"] == []
        assert team.get(f"{path}?name=a%00b").status_code == 422


def test_a_query_parameter_that_does_not_exist_is_refused(team: Team) -> None:
    answer = team.get("/jobs?statsu=failed&metadata[a]=b")
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert (fault["code"], fault["parameter"]) == ("field_unknown", "query.statsu")
    assert "Did you mean status?" in fault["detail"]
    assert team.get("/jobs?metadata[a]=b").status_code == 200
    # Of others it would be passed over, and everything returned.
    for path in ("/datasets", "/adapters"):
        assert team.get(f"{path}?metadata[a]=b").status_code == 422
    assert team.get("/healthz?probe=1").status_code == 200

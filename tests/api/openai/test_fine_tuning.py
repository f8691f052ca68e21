"""Training jobs as OpenAI's client sees them; the worker's part is played in rows."""

from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from api.openai.schemas.fine_tuning import GritOptions
from api.schemas.jobs import JobCreate
from store import attempts, events, jobs
from store.attempts import Claim, Failure, NewAdapter
from store.database import transaction
from store.ids import new_id
from store.jobs import NewJob
from store.models import Job, JobKind, Team
from tests.api.conftest import MODEL, rows
from tests.api.openai.conftest import Server


def file_of(client: OpenAI, count: int = 10) -> str:
    return client.files.create(file=rows(count), purpose="fine-tune").id


def create(client: OpenAI, **fields: Any) -> FineTuningJob:
    fields.setdefault("training_file", None)
    training_file = fields.pop("training_file") or file_of(client)
    return client.fine_tuning.jobs.create(model=MODEL, training_file=training_file, **fields)


def claim(server: Server, job_id: str) -> Claim:
    """Start a job, as a worker does."""
    with transaction(server.services.engine) as session:
        while True:
            claimed = attempts.claim_next(
                session, queue="cpu", worker_id="wrk_1", lease_seconds=600
            )
            assert claimed is not None
            if claimed.job.id == job_id:
                return claimed


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "type": "step_completed",
        "step": number,
        "total_steps": 4,
        "epoch": number / 2,
        "train_loss": 1 / number,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "num_tokens": 100,
        "tokens_per_second": 50.0,
        "elapsed_seconds": float(number),
        **changes,
    }


def train(server: Server, claimed: Claim, *steps: int) -> None:
    with transaction(server.services.engine) as session:
        told = [step(number) for number in steps]
        events.record_progress(session, claimed.job.id, claimed.attempt, told)


def succeed(server: Server, claimed: Claim, *, folder: Path | None = None) -> str:
    adapter = new_id("adp")
    if folder is not None:
        server.services.objects.put_folder(f"adapters/{adapter}", folder)
    with transaction(server.services.engine) as session:
        made = NewAdapter(id=adapter, prefix=f"adapters/{adapter}/", name=claimed.job.name)
        attempts.complete(
            session,
            job_id=claimed.job.id,
            attempt=claimed.attempt,
            adapter=made,
            result={"final_loss": 0.5},
        )
    return adapter


def test_a_job_is_created_from_a_model_and_a_file_alone(client: OpenAI, team: str) -> None:
    file = file_of(client)
    job = create(client, training_file=file)
    assert job.object == "fine_tuning.job"
    assert (job.status, job.model, job.training_file) == ("queued", MODEL, file)
    assert (job.organization_id, job.seed, job.fine_tuned_model) == (team, 0, None)
    assert job.hyperparameters.n_epochs == 3
    assert job.hyperparameters.learning_rate_multiplier == 1
    assert isinstance(job.hyperparameters.batch_size, int)
    assert job.method is not None
    assert job.method.type == "supervised"
    assert (job.finished_at, job.error, job.trained_tokens) == (None, None, None)
    # The model has 6 text blocks, and the balanced preset adapts 8.
    assert job.to_dict()["grit"]["preset"] == "smolvlm_fast"
    assert client.fine_tuning.jobs.retrieve(job.id) == job


@pytest.mark.parametrize("place", ["hyperparameters", "method"])
def test_hyperparameters_reach_the_job_from_both_places(client: OpenAI, place: str) -> None:
    wanted: Any = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    where: Any = (
        {"hyperparameters": wanted}
        if place == "hyperparameters"
        else {"method": {"type": "supervised", "supervised": {"hyperparameters": wanted}}}
    )
    job = create(client, seed=7, suffix="invoices", metadata={"run": "1"}, **where)
    assert job.hyperparameters.to_dict() == wanted
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.to_dict() == wanted
    assert (job.seed, job.metadata, job.to_dict()["grit"]["name"]) == (7, {"run": "1"}, "invoices")


def test_a_multiplier_is_of_the_default_learning_rate(server: Server, client: OpenAI) -> None:
    job = create(client, hyperparameters={"learning_rate_multiplier": 2.5, "n_epochs": "auto"})
    with transaction(server.services.engine) as session:
        training = session.get_one(Job, job.id).training
    assert training["learning_rate"] == pytest.approx(2.5 * 2e-4)
    assert training["epochs"] == 3


def test_our_own_fields_come_in_the_extra_body(server: Server, client: OpenAI) -> None:
    own = {
        "preset": "smolvlm_fast",
        "config": {"text": {"rank": 4}},
        "training": {"optimizer": "adamw", "epochs": 0.5},
        "priority": 3,
        "auto_start": False,
    }
    job = create(client, validation_file=file_of(client, 3), extra_body={"grit": own})
    assert (job.status, job.hyperparameters.n_epochs) == ("paused", 0.5)
    with transaction(server.services.engine) as session:
        row = session.get_one(Job, job.id)
        assert (row.training["optimizer"], row.priority) == ("adamw", 3)
        assert row.config["text"]["rank"] == 4
        assert row.eval_dataset_id == job.validation_file
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"


def test_every_field_of_a_job_has_its_place() -> None:
    mapped = {"model", "dataset", "eval_dataset", "name", "metadata"}
    assert GritOptions.model_fields.keys() == JobCreate.model_fields.keys() - mapped


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_type"),
        ({"method": {"type": "dpo"}}, "method.type", "invalid_value"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
            "integrations",
            "unsupported_parameter",
        ),
        ({"validation_file": "ds_none"}, "validation_file", "dataset_not_found"),
        ({"extra_body": {"grit": {"presett": "x"}}}, "grit.presett", "unknown_parameter"),
        ({"extra_body": {"grit": {"preset": "x"}}}, "grit.preset", "unknown_preset"),
        (
            {"extra_body": {"grit": {"preset": "smolvlm_fast", "text_layers": ["none"]}}},
            "grit.text_layers[0]",
            "no_layers_matched",
        ),
        ({"extra_body": {"grit": {"plan_hash": "0"}}}, "grit.plan_hash", "plan_changed"),
        ({"extra_body": {"epochs": 3}}, "epochs", "unknown_parameter"),
        (
            {
                "hyperparameters": {"n_epochs": 2},
                "extra_body": {"grit": {"training": {"epochs": 2}}},
            },
            "hyperparameters.n_epochs",
            "invalid_value",
        ),
    ],
)
def test_what_is_wrong_is_named_in_the_callers_words(
    client: OpenAI, fields: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        create(client, **fields)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert refused.value.status_code == (409 if code == "plan_changed" else 400)
    assert not list(client.fine_tuning.jobs.list())


def test_an_unknown_model_or_file_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="../none", training_file="ds_none")
    assert refused.value.param == "model"
    assert "ds_none" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=MODEL, training_file="ds_none")
    assert (refused.value.param, refused.value.code) == ("training_file", "dataset_not_found")


def test_a_jobs_life_up_to_its_model(server: Server, team: str, client: OpenAI) -> None:
    made = create(client, suffix="reader")
    claimed = claim(server, made.id)
    train(server, claimed, 1, 2)
    running = client.fine_tuning.jobs.retrieve(made.id)
    assert (running.status, running.fine_tuned_model, running.trained_tokens) == (
        *("running", None),
        None,
    )
    assert running.estimated_finish is not None
    train(server, claimed, 3, 4)
    adapter = succeed(server, claimed)
    done = client.fine_tuning.jobs.retrieve(made.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", adapter, 400)
    assert done.finished_at is not None
    assert done.finished_at >= done.created_at
    model = client.models.retrieve(adapter)
    assert model.owned_by == team
    assert model.to_dict()["grit"] == {"base_model": MODEL, "name": "reader", "job": made.id}
    with pytest.raises(openai.ConflictError) as refused:
        client.fine_tuning.jobs.cancel(made.id)
    assert refused.value.code == "illegal_transition"
    assert refused.value.response.headers["X-Should-Retry"] == "false"


def test_a_job_is_paused_resumed_and_cancelled(client: OpenAI) -> None:
    job = create(client).id
    assert client.fine_tuning.jobs.pause(job).status == "paused"
    assert client.fine_tuning.jobs.resume(job).status == "queued"
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job).finished_at is not None


def test_a_running_job_is_cancelled_when_its_attempt_has_stopped(
    server: Server, client: OpenAI
) -> None:
    job = create(client).id
    claimed = claim(server, job)
    told = client.fine_tuning.jobs.cancel(job)
    assert (told.status, told.to_dict()["grit"]["status"]) == ("running", "cancelling")
    with transaction(server.services.engine) as session:
        attempts.hand_back(session, job_id=job, attempt=claimed.attempt, reason="cancelled")
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"


def test_a_failed_job_says_why(server: Server, client: OpenAI) -> None:
    job = create(client).id
    claimed = claim(server, job)
    failure = Failure(code="diverged", message="The loss is not finite.", category="user")
    with transaction(server.services.engine) as session:
        attempts.fail(session, job_id=job, attempt=claimed.attempt, failure=failure)
    found = client.fine_tuning.jobs.retrieve(job)
    assert found.status == "failed"
    assert found.error is not None
    assert found.error.code == "diverged"
    assert found.error.message.startswith("The loss is not finite.")
    (last,) = client.fine_tuning.jobs.list_events(job, limit=1).data
    assert last.level == "error"


def test_events_come_newest_first_and_are_paged_to_the_first(
    server: Server, client: OpenAI
) -> None:
    job = create(client).id
    claimed = claim(server, job)
    for number in (1, 2, 3):
        train(server, claimed, number)
    page = client.fine_tuning.jobs.list_events(job, limit=2)
    assert [event.message for event in page.data] == [
        "Step 3/4, training loss=0.3333",
        "Step 2/4, training loss=0.5",
    ]
    assert {event.type for event in page.data} == {"metrics"}
    assert page.has_more
    messages = [event.message for event in islice(page, 10)]
    assert messages[2:] == [
        "Step 1/4, training loss=1",
        "The job is running.",
        "The job is queued.",
    ]
    assert isinstance(page.data[0].data, dict)
    assert page.data[0].data["step"] == 3


def test_checkpoints_carry_what_was_measured_at_their_step(server: Server, client: OpenAI) -> None:
    job = create(client).id
    claimed = claim(server, job)
    train(server, claimed, 1, 2, 3, 4)
    with transaction(server.services.engine) as session:
        for number in (2, 4):
            attempts.save_checkpoint_pointer(
                session,
                job_id=job,
                attempt=claimed.attempt,
                step=number,
                prefix=f"jobs/{job}/{number}/",
            )
    page = client.fine_tuning.jobs.checkpoints.list(job, limit=1)
    assert ([one.step_number for one in page.data], page.has_more) == ([4], True)
    found = list(islice(page, 5))  # a page that repeats itself would never end
    assert [one.step_number for one in found] == [4, 2]
    assert found[1].metrics.train_loss == 0.5
    assert {one.fine_tuning_job_id for one in found} == {job}
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.checkpoints.list(job, after="none")
    assert refused.value.param == "after"


def test_jobs_are_listed_newest_first_by_page_and_by_metadata(
    server: Server, team: str, client: OpenAI
) -> None:
    file = file_of(client)
    made = [create(client, training_file=file, metadata={"n": str(n)}).id for n in range(3)]
    compression_beside(server, team, made[1])
    page = client.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in page.data], page.has_more) == ([made[2], made[1]], True)
    assert [job.id for job in islice(page, 10)] == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [made[1]]
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list(extra_query={"metadata": "null"})


def compression_beside(server: Server, team: str, job_id: str) -> None:
    """Make a job that is no fine-tuning, over the same rows."""
    with transaction(server.services.engine) as session:
        row = session.get_one(Job, job_id)
        spec = NewJob(
            kind=JobKind.COMPRESSION,
            model=row.model,
            dataset_id=row.dataset_id,
            request={"max_kl": 0.01, "num_rows": 8},
            config={},
            training={},
            plan={},
            plan_hash="0",
            device="cpu",
            queue="cpu",
        )
        made, _ = jobs.create_job(session, team=team, spec=spec)
        compression = made.id
    client = server.client(team)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(compression)


def test_an_idempotency_key_creates_one_job(client: OpenAI) -> None:
    file = file_of(client)
    headers = {"Idempotency-Key": "one"}
    first = create(client, training_file=file, extra_headers=headers)
    second = create(client, training_file=file, extra_headers=headers)
    assert first.id == second.id
    with pytest.raises(openai.ConflictError) as refused:
        create(client, training_file=file, suffix="other", extra_headers=headers)
    assert refused.value.code == "idempotency_key_reused"


def test_a_quota_is_a_rate_limit_with_a_time_to_come_again(
    server: Server, team: str, client: OpenAI
) -> None:
    create(client)
    with transaction(server.services.engine) as session:
        session.get_one(Team, team).max_open_jobs = 1
    with pytest.raises(openai.RateLimitError) as refused:
        create(client)
    assert (refused.value.code, refused.value.type) == ("quota_exceeded", "rate_limit_error")
    assert int(refused.value.response.headers["Retry-After"]) > 0


def test_another_teams_job_is_not_there(server: Server, client: OpenAI) -> None:
    foreign = create(server.client("someone-else")).id
    calls = client.fine_tuning.jobs
    for act in (
        *(calls.retrieve, calls.cancel, calls.pause, calls.resume, calls.list_events),
        calls.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            act(foreign)
    assert foreign not in {job.id for job in calls.list()}
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, training_file=file_of(server.client("someone-else")))
    assert refused.value.param == "training_file"

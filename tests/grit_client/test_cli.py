import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grit_client.cli import app
from store import attempts, base_models, lifecycle
from store.database import transaction
from store.keys import Scope
from store.models import JobStatus
from store.orphans import log_key
from tests.api.conftest import MODEL, png, rows
from tests.grit_client.conftest import GRIT, Ran, Service, interruptible

Grit = Callable[..., Ran]


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from grit_client.cli import app\n"
        "import typer.testing\n"
        "done = typer.testing.CliRunner().invoke(app, ['--help'])\n"
        "assert done.exit_code == 0 and 'submit' in done.output, done.output\n"
        "print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "transformers", "peft", "fastapi", "sqlalchemy", "pydantic", "httpx", "store"}
    assert heavy.isdisjoint(loaded)

    def processor_seconds() -> float:  # a busy machine changes them little
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([GRIT, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(processor_seconds() for _ in range(3)) < 0.5


def test_every_command_explains_itself() -> None:
    for command in (
        "up", "down", "status", "plan", "submit", "watch", "jobs", "job", "cancel", "pause",
        "resume", "retry", "infer", "chat", "presets", "devices",
    ):  # fmt: skip
        done = CliRunner().invoke(app, [command, "--help"])
        assert done.exit_code == 0
        assert "--json" in done.output
        assert "Raises" not in done.output


@pytest.mark.slow
def test_a_job_from_the_command_line(grit: Grit, service: Service) -> None:
    uploaded = grit("datasets", "upload", service.rows_file(), "--json")
    assert uploaded.code == 0
    dataset = uploaded.json["id"]
    spec = service.spec_file(dataset=dataset)
    planned = grit("plan", spec, "--json")
    assert len(planned.json["layers"]) == 8
    assert "self_attn" in grit("plan", spec).out
    job = grit("submit", spec, "--name", "mine", "--json").json
    assert job["name"] == "mine"
    assert [item["id"] for item in grit("jobs", "--json").json] == [job["id"]]
    assert grit("jobs", "--status", "failed", "--json").json == []
    assert job["id"] in grit("jobs").out
    shown = grit("job", job["id"])
    assert "queued" in shown.out
    for verb, status in (
        ("pause", "paused"),
        ("resume", "queued"),
        ("cancel", "cancelled"),
        ("retry", "queued"),
    ):
        assert grit(verb, job["id"], "--json").json["status"] == status


def test_a_dataset_file_is_uploaded_on_the_way(grit: Grit, service: Service) -> None:
    job = grit("submit", service.spec_file(), "--dataset", service.rows_file(), "--json")
    assert job.code == 0, job.err
    assert job.json["dataset"].startswith("ds_")
    neither = grit("submit", service.spec_file(), "--dataset", "nowhere.jsonl")
    assert neither.code == 2
    assert "there is no file 'nowhere.jsonl'" in neither.err
    assert "no dataset with the id or name 'nowhere.jsonl'" in neither.err


def test_a_retention_dataset_is_uploaded_on_the_way_and_shown_before_and_after(
    grit: Grit, service: Service
) -> None:
    rows_file = service.rows_file()
    both = ("--dataset", rows_file, "--retention-dataset", rows_file)
    assert grit("plan", service.spec_file(), *both, "--json").code == 0
    job = grit("submit", service.spec_file(), *both, "--json")
    assert job.code == 0, job.err
    kept = job.json["retention_dataset"]
    assert kept.startswith("ds_")
    with transaction(service.services.engine) as session:
        claim = attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=60)
        assert claim is not None
        attempts.complete(
            session,
            job_id=claim.job.id,
            attempt=claim.attempt,
            adapter=attempts.NewAdapter(id="adp_1", prefix="adapters/adp_1"),
            result={"retention": {"dataset": kept, "loss_before": 1.25, "loss_after": 1.5}},
        )
    shown = grit("job", job.json["id"]).out
    assert kept in shown
    assert "1.2500 -> 1.5000" in shown
    assert "compaction" not in shown
    neither = grit("submit", service.spec_file(), "--retention-dataset", "old-task")
    assert neither.code == 2
    assert "--retention-dataset: there is no file 'old-task'" in neither.err


def test_url_and_key_come_from_options_or_the_environment(grit: Grit, service: Service) -> None:
    elsewhere = ("--home", service.folder / "empty", "--json")
    assert grit("jobs", *elsewhere, "--url", service.url, "--key", service.key).json == []
    assert grit("jobs", *elsewhere, GRIT_URL=service.url, GRIT_API_KEY=service.key).json == []
    assert grit("jobs", "--json", GRIT_HOME=str(service.home.folder)).json == []


def test_refused_input_ends_with_2_and_names_every_fault(grit: Grit, service: Service) -> None:
    spec = service.spec_file(eval_fraction=3.5, priority="high", preset="smolvlm_fats")
    done = grit("plan", spec)
    assert done.code == 2
    assert done.out == ""
    for part in ("eval_fraction is 3.5", "priority is 'high'", "smolvlm_fast"):
        assert done.err.count(part) == 1
    as_json = grit("plan", spec, "--json")
    assert as_json.code == 2
    assert as_json.out == ""
    document = json.loads(as_json.err)
    pointers = [fault["pointer"] for fault in document["errors"]]
    assert {"/eval_fraction", "/priority", "/preset", "/dataset"} == set(pointers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model": "a", "model": "b"}', "appears twice"),
        ('{"eval_fraction": NaN}', "finite"),
        ("[1]", "object"),
        ("{", "line 1"),
    ],
)
def test_a_file_that_is_no_job_ends_with_2(
    grit: Grit, tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "job.json"
    path.write_text(text)
    done = grit("plan", path, "--url", "http://127.0.0.1:1")
    assert done.code == 2
    assert words in done.err
    assert done.out == ""


def test_usage_errors_end_with_2(grit: Grit) -> None:
    assert grit("jobs", "--limit", "none").code == 2
    assert grit("no-such-command").code == 2
    assert grit("plan", "missing.json").code == 2
    assert grit("infer", "--prompt", "what?").code == 2


def test_nobody_there_ends_with_3(grit: Grit) -> None:
    done = grit("jobs", "--url", "http://127.0.0.1:1")
    assert done.code == 3
    assert "grit up" in done.err
    assert grit("status", "--url", "http://127.0.0.1:1").code == 3


def test_a_wrong_key_ends_with_4(grit: Grit, service: Service) -> None:
    done = grit("jobs", "--key", "grit_wrong_key")
    assert done.code == 4
    assert "--key" in done.err
    reader = service.key_with(Scope.READ)
    assert grit("datasets", "upload", service.rows_file(), "--key", reader).code == 4


def test_an_unknown_id_ends_with_5(grit: Grit, service: Service) -> None:
    assert service.url
    for command in (("job", "job_x"), ("cancel", "job_x"), ("adapters", "show", "adp_x")):
        done = grit(*command)
        assert done.code == 5
        assert command[-1] in done.err


def test_a_failed_job_ends_a_watch_with_1(grit: Grit, service: Service) -> None:
    job = grit("submit", service.spec_file(), "--dataset", service.rows_file(), "--json").json["id"]
    with transaction(service.services.engine) as session:
        lifecycle.transition(session, job, to=JobStatus.CANCELLED)
    done = grit("watch", job, "--json")
    assert done.code == 1
    assert done.json["status"] == "cancelled"
    assert job in grit("watch", job).err


def test_a_watch_that_is_interrupted_ends_with_130_and_leaves_the_job(
    grit: Grit, service: Service
) -> None:
    job = grit("submit", service.spec_file(), "--dataset", service.rows_file(), "--json").json["id"]
    watch = subprocess.Popen(
        [GRIT, "watch", job, "--home", str(service.home.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,  # noqa: PLW1509 - it sets one signal and no more
    )
    assert watch.stderr is not None
    assert "queued" in watch.stderr.readline()
    watch.send_signal(2)
    _, err = watch.communicate(timeout=20)
    assert watch.returncode == 130
    assert "The job goes on" in err
    assert "Traceback" not in err
    assert grit("job", job, "--json").json["status"] == "queued"


def test_bad_rows_are_reported_line_by_line(grit: Grit, service: Service) -> None:
    path = service.folder / "bad.jsonl"
    path.write_bytes(rows(2) + b'{"messages": 5}\n')
    done = grit("datasets", "upload", path)
    assert done.code == 2
    assert "line 3" in done.err
    dataset = done.err.split("grit datasets report ")[1].split()[0]
    report = grit("datasets", "report", dataset)
    assert "/messages" in report.out
    kept = grit("datasets", "upload", path, "--on-bad-rows", "skip", "--json")
    assert kept.json["num_bad_rows"] == 1
    assert len(grit("datasets", "list", "--json").json) == 2


def test_columns_that_are_not_read_are_said_at_upload_and_in_plan_and_job(
    grit: Grit, service: Service
) -> None:
    path = service.folder / "columns.jsonl"
    lines = [{**json.loads(line), "origin": "web"} for line in rows(3).splitlines()]
    path.write_text("\n".join(map(json.dumps, lines)))
    note = "columns that are not read: origin"
    uploaded = grit("datasets", "upload", path)
    assert note in " ".join(uploaded.out.split())
    planned = grit("plan", service.spec_file(), "--dataset", path)
    assert note in " ".join(planned.out.split())
    assert note in " ".join(planned.err.split())
    job = grit("submit", service.spec_file(), "--dataset", path, "--json").json["id"]
    assert note in " ".join(grit("job", job).out.split())
    assert note in " ".join(grit("datasets", "list", "--json").json[0]["details"]["notes"])


def test_a_text_of_the_service_cannot_drive_the_terminal(grit: Grit, service: Service) -> None:
    spec = service.spec_file()
    grit("submit", spec, "--dataset", service.rows_file(), "--name", "[red]bold[/] name")
    assert "[red]bold[/] name" in grit("jobs").out


def test_a_log_is_shown_and_cannot_drive_the_terminal(grit: Grit, service: Service) -> None:
    grit("submit", service.spec_file(), "--dataset", service.rows_file())
    with transaction(service.services.engine) as session:
        claim = attempts.claim_next(session, queue="cpu", worker_id="wrk_1", lease_seconds=60)
    assert claim is not None
    job = claim.job.id
    assert grit("logs", job).out.strip() == ""
    long = "word" * 75
    service.services.objects.put_bytes(log_key(job, 1), f"a\x1b[31m [red]\n{long}\n".encode())
    assert grit("logs", job).out == f"a\\x1b[31m [red]\n{long}\n"
    assert grit("logs", job, "--attempt", "1", "--tail-bytes", "302").out == f"{long}\n"
    assert grit("logs", job, "--attempt", "2").code == 5


def test_every_list_is_json_and_a_table(service: Service) -> None:
    for command in (
        ("jobs",), ("presets",), ("devices",), ("models", "list"), ("datasets", "list"),
        ("adapters", "list"), ("keys", "list"), ("status",), ("models", "layers", MODEL),
        ("teams", "list"), ("teams", "show"), ("teams", "show", "default"),
    ):  # fmt: skip
        home = ["--home", str(service.home.folder)]
        done = CliRunner().invoke(app, [*command, *home, "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) is not None
        shown = CliRunner().invoke(app, [*command, *home])
        assert shown.exit_code == 0
        assert shown.stdout


def test_a_failed_model_is_deleted_by_its_id(service: Service, grit: Grit) -> None:
    with transaction(service.services.engine) as session:
        base_models.register(session, id="org/wrong", source="/gone")
        base_models.save_failure(session, id="org/wrong", code="model_unavailable", message="x")
    assert grit("models", "delete", "org/wrong").out.strip() == "Deleted org/wrong."
    assert grit("models", "delete", "org/wrong").code != 0


@pytest.mark.slow
def test_teams_from_the_command_line(grit: Grit, service: Service) -> None:
    assert service.key
    done = grit("teams", "set", "default", "--max-open-jobs", "5", "--json")
    assert done.json["own_limits"]["max_open_jobs"] == 5
    assert grit("teams", "set", "default", "--max-open-jobs", "many").code == 2
    back = grit("teams", "set", "default", "--max-open-jobs", "default", "--json")
    assert back.json["own_limits"]["max_open_jobs"] is None
    assert grit("teams", "show", "nobody").code == 5


@pytest.mark.slow
def test_keys_from_the_command_line(grit: Grit, service: Service) -> None:
    made = grit("keys", "create", "ci", "--scope", "read", "--json").json
    assert grit("jobs", "--key", made["key"], "--json").json == []
    renewed = grit("keys", "rotate", made["id"], "--overlap-seconds", "60", "--json").json
    assert grit("jobs", "--key", renewed["key"], "--json").json == []
    assert grit("keys", "revoke", made["id"]).code == 0
    assert grit("jobs", "--key", made["key"]).code == 4
    assert grit("keys", "create", "ci", "--scope", "everything").code == 2
    assert service.key


def test_infer_says_why_it_cannot(grit: Grit, service: Service) -> None:
    (service.folder / "image.png").write_bytes(png())
    (service.folder / "text.png").write_text("no image")
    assert grit("infer", "--model", MODEL, "--prompt", "?", "--image", "text.png").code == 2
    done = grit("infer", "--job", "job_x", "--prompt", "?", "--image", "image.png")
    assert done.code == 5

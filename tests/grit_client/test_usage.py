"""How a command line is read: options on both sides of a command, slips, readers that leave."""

import json
import subprocess
from collections.abc import Callable

import pytest

from grit_client.commands.choices import JobStatus, OnBadRows, Scope
from store import keys, models
from tests.grit_client.conftest import GRIT, Ran, Service

Cli = Callable[..., Ran]


def test_options_stand_before_the_command_or_after_it(cli: Cli, shared_service: Service) -> None:
    service = shared_service
    address = ("--url", service.url, "--key", service.key, "--home", service.folder / "none")
    assert cli(*address, "--json", "jobs").json == []
    assert cli("jobs", *address, "--json").json == []
    assert cli("--json", *address[:2], "datasets", *address[2:], "list").json == []


def test_the_option_nearest_the_command_counts(cli: Cli, shared_service: Service) -> None:
    wrong = ("--url", "http://127.0.0.1:9")
    assert cli(*wrong, "jobs", "--url", shared_service.url, "--json").json == []
    assert cli("--url", shared_service.url, "jobs", *wrong).code == 3
    assert cli("--url", shared_service.url, "jobs", "--json", GRIT_URL=wrong[1]).json == []


def test_a_group_without_a_command_explains_itself(cli: Cli) -> None:
    for arguments in ((), ("datasets",), ("keys", "--json")):
        shown = cli(*arguments)
        assert (shown.code, shown.err) == (2, "")
        assert f"Usage: {' '.join(['grit', *arguments[:1]])} [OPTIONS] COMMAND" in shown.out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("job_s",), "grit jobs"),
        (("train", "job.json"), "grit submit"),
        (("upload", "rows.jsonl"), "grit datasets upload"),
        (("datasets", "ls"), "grit datasets list"),
        (("jobs", "--staus", "failed"), "--status"),
        (("jobs", "--status", "faild"), "failed"),
        (("keys", "create", "x", "--scope", "raed"), "read"),
    ],
)
def test_a_slip_is_answered_with_the_nearest(cli: Cli, typed: tuple[str, ...], meant: str) -> None:
    done = cli(*typed)
    assert done.code == 2
    assert done.out == ""
    assert f"Did you mean {meant}?" in done.err.replace("`", "")
    assert len(done.err.splitlines()) == 2


def test_a_status_has_no_case(cli: Cli) -> None:
    assert cli("jobs", "--status", "FAILED", "--json").json == []


def test_a_slip_is_json_when_json_is_asked_for(cli: Cli) -> None:
    document = json.loads(cli("jobs", "--limit", "ten", "--json").err)
    assert document["exit_code"] == 2
    assert document["detail"] == "--limit is 'ten'; give a whole number."


def test_the_choices_are_those_of_the_service() -> None:
    assert set(JobStatus) == set(models.JobStatus)
    assert set(Scope) == set(keys.Scope)
    assert set(OnBadRows) == {"reject", "skip"}


@pytest.mark.parametrize("arguments", ["presets", "presets --json"])
def test_a_reader_that_leaves_is_no_error(shared_service: Service, arguments: str) -> None:
    command = f"{{ {GRIT} {arguments}; echo $? >&3; }} | true"
    done = subprocess.run(
        ["sh", "-c", f"exec 3>code; {command}"],
        cwd=shared_service.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    assert (shared_service.folder / "code").read_text() == "141\n"


def test_every_fault_of_a_command_comes_at_once(cli: Cli) -> None:
    done = cli("infer", "--image", "no.png", "--image", "none.png")
    assert done.code == 2
    for part in ("--job, --adapter and --model", "question", "'no.png'", "'none.png'"):
        assert done.err.count(part) == 1


def test_an_address_that_is_nearly_right_is_answered_with_the_right_one(
    cli: Cli, shared_service: Service
) -> None:
    url = shared_service.url
    place = url.removeprefix("http://")
    for wrong, right in (
        (place, url),
        (f"{url}/v1", url),
        (f"{url}/v1/", url),
        (f"{url}/docs", url),
        (f"https://{place}", url),
    ):
        done = cli("jobs", "--url", wrong, "--key", "x")
        assert done.code in {2, 3}
        assert f"write {right}." in done.err or f"Is it {right}?" in done.err
        assert "Traceback" not in done.err
    assert cli("jobs", "--url", f" {url}/ ", "--key", shared_service.key, "--json").json == []


def test_a_refused_key_says_where_it_came_from(cli: Cli, shared_service: Service) -> None:
    wrong = "grit_0123456789ab_wrong"
    assert "This key came from --key" in cli("jobs", "--key", wrong).err
    assert "This key came from GRIT_API_KEY" in cli("jobs", GRIT_API_KEY=wrong).err
    none = cli("jobs", "--url", shared_service.url, "--home", shared_service.folder / "none").err
    assert "Give a key with --key or GRIT_API_KEY" in none


def test_an_argument_too_many_says_what_it_is_and_what_may_be_wrong(cli: Cli) -> None:
    question = cli("infer", "Which", "digit", "is", "this", "--model", "x")
    assert question.code == 2
    assert "takes no argument after its question; 'digit is this' is too much" in question.err
    assert "in quotes" in question.err
    assert "`grit jobs` takes no argument; 'list' is too much." in cli("jobs", "list").err


def test_an_option_before_its_command_is_answered_with_the_place(cli: Cli) -> None:
    done = cli("--limit", "3", "jobs")
    assert done.code == 2
    assert "--limit belongs after its command: grit jobs --limit ..." in done.err


def test_an_option_that_nothing_is_like_has_no_nearest(cli: Cli) -> None:
    assert "There is no option --revision.\n" in cli("models", "add", "x", "--revision", "main").err


def test_an_empty_model_is_not_the_working_folder(cli: Cli, shared_service: Service) -> None:
    done = cli("plan", shared_service.spec_file(), "--model", "")
    assert (done.code, done.out) == (2, "")
    assert "--model is empty" in done.err


def test_a_preset_that_is_not_there_is_answered_with_the_nearest(cli: Cli) -> None:
    done = cli("presets", "smolvlm_fats")
    assert done.code == 5
    assert "The nearest are smolvlm_fast" in done.err


def test_a_home_without_a_service_is_named(
    cli: Cli, shared_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grit_client.client.DEFAULT_URL", "http://127.0.0.1:9")
    empty = shared_service.folder / "empty"
    done = cli("jobs", "--home", empty)
    assert done.code == 3
    assert f"No service was started in {empty}" in done.err
    assert "(Connection refused)" in done.err
    assert "No service was started" not in cli("jobs", "--url", "http://127.0.0.1:9").err


@pytest.mark.parametrize("arguments", ["presets", "presets --json"])
def test_a_full_disk_under_the_output_is_one_line(shared_service: Service, arguments: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{GRIT} {arguments} > /dev/full"],
        cwd=shared_service.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: The output cannot be written: No space left on device.\n",
    )


def test_a_home_that_cannot_be_used_is_named(cli: Cli, shared_service: Service) -> None:
    file = shared_service.folder / "file"
    file.touch()
    for command in (("up", "--detach"), ("up",)):
        done = cli(*command, "--home", file)
        assert done.code == 3
        assert f"The folder {file} cannot be used: " in done.err
        assert "Name another with --home" in done.err
    unreadable = shared_service.folder / "unreadable"
    (unreadable / "url").mkdir(parents=True)
    done = cli("jobs", "--home", unreadable)
    assert done.code == 2
    assert f"{unreadable / 'url'} cannot be read: Is a directory." in done.err
    address = ("--url", shared_service.url, "--key", shared_service.key)
    assert cli("jobs", "--home", unreadable, *address, "--json").json == []

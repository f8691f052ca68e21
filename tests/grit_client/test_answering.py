"""`grit infer` and `grit chat` against a real service with a real inference worker."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from grit_client.client import GritClient
from store.keys import Scope
from tests.api.conftest import png
from tests.api.openai.conftest import Server, inference, server
from tests.grit_client.conftest import GRIT, Ran, interruptible
from tests.run_guard import run_mark

__all__ = ["inference", "server"]

pytestmark = pytest.mark.slow


@dataclass(kw_only=True)
class Answering:
    """A service that answers."""

    model: str
    environment: dict[str, str]
    client: GritClient

    def __call__(self, grit: Callable[..., Ran], *arguments: object) -> Ran:
        return grit(*arguments, **self.environment)


@pytest.fixture(scope="module")
def service(server: Server, inference: Callable[[], str]) -> Iterator[Answering]:
    key = server.key("default", Scope.READ, Scope.WRITE, Scope.INFER)
    environment = {"GRIT_URL": server.url, "GRIT_API_KEY": key}
    with GritClient(server.url, key) as client:
        yield Answering(model=inference(), environment=environment, client=client)


def chat(service: Answering, folder: Path, *lines: str, options: tuple[str, ...] = ()) -> Ran:
    done = subprocess.run(
        [GRIT, "chat", "--model", service.model, "--max-new-tokens", "8", *options],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **run_mark(), **service.environment},
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


def test_a_streamed_answer_is_the_whole_one(service: Answering) -> None:
    options = {"model": service.model, "images": [png(16)], "max_new_tokens": 24}
    whole = service.client.infer("Which digit is this?", **options)
    with service.client.stream("Which digit is this?", **options) as pieces:
        assert "".join(pieces) == whole["output"]
    assert pieces.answer is not None
    assert pieces.answer["output"] == whole["output"]
    assert pieces.answer["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_infer_shows_the_same_whole_streamed_and_as_json(
    service: Answering, grit: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "image.png").write_bytes(png(16))
    asked = ("--model", service.model, "--image", "image.png", "--max-new-tokens", "12")
    whole = service(grit, "infer", "What is it?", *asked)
    assert whole.code == 0, whole.err
    streamed = service(grit, "infer", "What is it?", *asked, "--stream")
    assert streamed.out.strip() == whole.out.strip()
    assert "tokens/s" in streamed.err
    answer = service(grit, "infer", "--prompt", "What is it?", *asked, "--json")
    assert answer.json["output"].strip() == whole.out.strip()
    system = service(grit, "infer", "What is it?", *asked, "--system", "Be brief.", "--json")
    assert system.json["usage"]["prompt_tokens"] > answer.json["usage"]["prompt_tokens"]
    assert service(grit, "infer", *asked).code == 2
    assert service(grit, "infer", "one", "--prompt", "two", *asked).code == 2


def test_infer_holds_the_answer_to_the_schema_of_a_file(
    service: Answering, grit: Callable[..., Ran], tmp_path: Path
) -> None:
    schema = {"type": "array", "items": {"enum": ["odd", "even"]}, "minItems": 1, "maxItems": 2}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    asked = ("--model", service.model, "--max-new-tokens", "200", "--schema")
    done = service(grit, "infer", "Which?", *asked, "schema.json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)) <= {"odd", "even"}
    own = service.client.infer("Which?", model=service.model, schema=schema, max_new_tokens=200)
    assert json.loads(own["output"]) == json.loads(done.out)
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "wrong.json").write_text('{"not": {}}')
    for name, words in (
        ("torn.json", "is not JSON"),
        ("list.json", "not a JSON object"),
        ("gone.json", "cannot be read"),
        ("wrong.json", "`not`"),
    ):
        refused = service(grit, "infer", "Which?", *asked, name)
        assert refused.code != 0
        assert words in " ".join(refused.err.split())


def test_a_chat_goes_on_and_becomes_a_row_of_a_dataset(service: Answering, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png(16))
    done = chat(
        service,
        tmp_path,
        "/save rows.jsonl",
        "/system Be brief.",
        "/image image.png",
        "Which digit is this?",
        "Are you sure?",
        "/save rows.jsonl",
        "/clear",
        "Hello.",
        "/save rows.jsonl",
        "/dance",
        "/exit",
        "never asked",
    )
    assert done.code == 0, done.err
    assert "Nothing has been said yet" in done.err
    assert "There is no command /dance;" in done.err
    assert "prompt tokens reused" in done.err  # the second question goes on from the first
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [turn["role"] for turn in first["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert first["messages"][1]["content"][0]["type"] == "image_url"
    assert [turn["role"] for turn in second["messages"]] == ["system", "user", "assistant"]
    answers = [turn["content"] for turn in first["messages"] if turn["role"] == "assistant"]
    assert all(answer in done.out for answer in answers)
    # A random model's words may be control characters, which no dataset takes.
    for row in (first, second):
        for message in row["messages"]:
            if message["role"] == "assistant":
                message["content"] = "7"
    rows = "".join(json.dumps(row) + "\n" for row in (first, second))
    (tmp_path / "rows.jsonl").write_text(rows)
    assert service.client.upload_dataset(tmp_path / "rows.jsonl")["num_rows"] == 2


def test_what_goes_wrong_in_a_chat_is_told_and_the_chat_goes_on(
    service: Answering, tmp_path: Path
) -> None:
    done = chat(service, tmp_path, "/image nowhere.png", "x" * 1100, "/system", "Hello.")
    assert done.code == 0, done.err
    assert "nowhere.png" in done.err
    assert "/clear forgets what was said" in done.err  # beyond the model's context
    assert done.out.strip()
    assert chat(service, tmp_path, "Hello.", options=("--job", "job_x")).code == 2


def test_an_interrupted_answer_ends_with_130_and_no_traceback(
    service: Answering, tmp_path: Path
) -> None:
    options = {"model": service.model, "max_new_tokens": 900, "temperature": 1.5}
    seed = next(
        seed
        for seed in range(20)
        if service.client.infer("Tell me.", seed=seed, **options)["finish_reason"] == "length"
    )
    asking = subprocess.Popen(
        [
            *(GRIT, "infer", "Tell me.", "--model", service.model, "--stream"),
            *("--max-new-tokens", "900", "--temperature", "1.5", "--seed", str(seed)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HOME": str(tmp_path), **service.environment},
        cwd=tmp_path,
        preexec_fn=interruptible,  # noqa: PLW1509 - it sets one signal and no more
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1)
    asking.send_signal(signal.SIGINT)
    _, error = asking.communicate(timeout=30)
    assert b"Traceback" not in error
    assert asking.returncode == 130

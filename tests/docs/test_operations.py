"""docs/operations.md, followed to the letter: from empty servers to an answering adapter.

Only what the page asks the reader to replace is replaced: the values in `values.sh`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from store.tables import known_revisions
from tests.ports import reserve_port
from tests.services import S3, Postgres, psql_folder
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, write_jsonl

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VALUE = re.compile(r"^export (\w+)=(\S+)", re.MULTILINE)
_STEP = re.compile(r"^\*\*(\d)\. ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    file: str | None
    text: str


def section(title: str) -> str:
    after = PAGE.split(f"\n## {title}\n", 1)[1]
    return after.split("\n## ", 1)[0]


def blocks(text: str) -> list[Block]:
    return [Block(found[1], found[2], found[3]) for found in _FENCE.finditer(text)]


WALK = section("From empty servers to an answering adapter")


@dataclass(frozen=True)
class Followed:
    folder: Path
    status: int
    output: str

    def __str__(self) -> str:
        logs = [f"{log.name}: {log.read_text()[-2000:]}" for log in self.folder.glob("*.log")]
        return "\n".join([self.output[-6000:], *logs])


@pytest.fixture(scope="module")
def followed(
    postgres: Postgres, valkey: str, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Followed]:
    """Run every block of the section in one shell, in the page's order."""
    here = tmp_path_factory.mktemp("operator")
    models = here / "models"
    models.mkdir()
    database = f"127.0.0.1:{postgres.port}"
    mine = {
        "PG_ADMIN": f"postgresql://grit@{database}/postgres",
        "DATABASE_URL": f"postgresql://grit_service@{database}/grit_service",
        "BROKER_URL": valkey[: valkey.rindex("/")] + "/7",
        "S3_ENDPOINT": s3.endpoint,
        "S3_BUCKET": s3.bucket,
        "S3_ACCESS_KEY_ID": s3.access_key_id,
        "FOLDER": str(here / "service"),
        "PORT": str(reserve_port()),
        "MODEL": str(tiny_causal_folder(models, layers=4)),
        "PRESET": "llama_fast",
        "ROWS": str(write_jsonl(here / "rows.jsonl", tiny_chat_rows(16, images=False))),
    }
    values, *steps = blocks(WALK)
    assert values.file == "values.sh"
    assert set(_VALUE.findall(values.text))
    assert dict(_VALUE.findall(values.text)).keys() == mine.keys()
    replaced = _VALUE.sub(lambda found: f"export {found[1]}={mine[found[1]]}", values.text)
    (here / values.file).write_text(replaced, encoding="utf-8")
    script = "\n".join(block.text for block in steps if block.language == "bash")
    path = [str(Path(sys.executable).parent), str(psql_folder()), os.environ["PATH"]]
    process = subprocess.Popen(
        ["/bin/bash", "-euo", "pipefail", "-c", script],
        cwd=here,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("GRIT_")},
            "PATH": ":".join(path),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        },
        stdout=(output := (here / "output").open("w")),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        status = process.wait(540)
    finally:
        output.close()
        end_session(process.pid)
    yield Followed(here / "service", status, (here / "output").read_text())
    shutil.rmtree(here)


def end_session(leader: int) -> None:
    """End what the shell left in the background, with what that started."""
    ours = []
    for each in psutil.process_iter():
        try:
            if os.getsid(each.pid) == leader:
                ours.append(each)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    for each in ours:
        each.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(ours, timeout=30)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive)


pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_the_steps_are_numbered_without_a_gap() -> None:
    assert _STEP.findall(WALK) == [str(number) for number in range(1, 10)]


def test_following_the_page_ends_with_an_answer_of_the_adapter(followed: Followed) -> None:
    assert followed.status == 0, str(followed)
    assert "Traceback" not in followed.output
    # The last command is the question; the answer of a random model is any text.
    assert "succeeded" in followed.output, str(followed)


def test_the_page_shows_what_its_commands_print(followed: Followed) -> None:
    shown = [block.text for block in blocks(WALK) if block.language == "text"]
    assert len(shown) == 1
    assert shown[0] in followed.output, str(followed)
    assert known_revisions()[-1] in shown[0]


def test_no_password_is_in_a_log_or_an_output(followed: Followed) -> None:
    password = (followed.folder / "secrets" / "grit_database_password").read_text()
    assert len(password) > 40
    logs = [log.read_text() for log in followed.folder.glob("*.log")]
    assert len(logs) == 3
    assert not [text for text in [followed.output, *logs] if password in text]

"""Every Python block of docs/openai.md, run one after another against a real service."""

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api.openai.schemas.chat import UNSUPPORTED, UNSUPPORTED_IN_MESSAGES, ChatCompletionRequest
from api.openai.schemas.fine_tuning import GritOptions
from grit_core.images import decode_data_url
from store import base_models, jobs
from store.database import transaction
from store.jobs import JobFilters
from store.models import JobStatus
from tests.api.openai.conftest import Server, adapter_folder
from tests.api.openai.test_fine_tuning import claim, succeed, train
from tests.e2e.deployment import ROOT

EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_names_every_parameter() -> None:
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose))))
    assert UNSUPPORTED.keys() | UNSUPPORTED_IN_MESSAGES.keys() - {"annotations"} <= named
    assert ChatCompletionRequest.model_fields.keys() - {"model"} <= named
    assert GritOptions.model_fields.keys() <= named


@pytest.mark.slow
def test_the_blocks_of_the_page_run(
    server: Server,
    inference: Callable[[], str],
    team: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inference()
    register(server, "digits-vlm", EXAMPLES / "digits-vlm")
    (tmp_path / ".grit").mkdir()
    (tmp_path / ".grit" / "url").write_text(f"{server.url}\n")
    (tmp_path / ".grit" / "key").write_text(f"{server.key(team)}\n")
    rows = (EXAMPLES / "digits" / "upright-heldout.jsonl").read_text().splitlines()[:20]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    asked, answered = json.loads(rows[0])["messages"]
    (tmp_path / "digit.png").write_bytes(decode_data_url(asked["content"][0]["image_url"]["url"]))
    trained = adapter_folder(str(EXAMPLES / "digits-vlm"), tmp_path / "adapter", model="digits-vlm")
    monkeypatch.chdir(tmp_path)
    done = threading.Event()
    worker = threading.Thread(target=play_the_worker, args=(server, team, trained, done))
    worker.start()
    names: dict[str, Any] = {}
    answers = []
    try:
        for block in BLOCKS:
            exec(compile(block, "docs/openai.md", "exec"), names)  # noqa: S102 - our own page
            answers.append(names.get("answer"))
    finally:
        done.set()
        worker.join(20)
        if "client" in names:
            names["client"].close()
    assert answers[1].choices[0].message.content == answered["content"]
    assert names["job"].status == "succeeded"
    assert names["job"].hyperparameters.learning_rate_multiplier == 1.5
    assert answers[-1].model == names["job"].fine_tuned_model


def register(server: Server, name: str, folder: Path) -> None:
    from grit_core.models.inventory import build_inventory  # noqa: PLC0415 - loads torch

    inventory = build_inventory(str(folder))
    with transaction(server.services.engine) as session:
        base_models.register(session, id=name, source=str(folder))
        base_models.save_inventory(
            session, id=name, inventory=inventory.to_json(), inventory_hash=inventory.hash
        )


def play_the_worker(server: Server, team: str, trained: Path, done: threading.Event) -> None:
    """Complete the team's queued job with an adapter that is really there."""
    while not done.is_set():
        with transaction(server.services.engine, read_only=True) as session:
            waiting = JobFilters(statuses=(JobStatus.QUEUED,))
            found = jobs.list_jobs(session, team=team, filters=waiting).rows
        for job in found:
            if job.name == "rotated-digits":
                claimed = claim(server, job.id)
                train(server, claimed, 1, 2)
                succeed(server, claimed, folder=trained)
                return
        time.sleep(0.05)

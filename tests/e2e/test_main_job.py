"""The main job as a new user runs it: one command, and then every call by hand.

`examples/demo.py` starts the embedded service with all its processes and fine-tunes the digits
model; what follows uses the service that it leaves behind.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from grit_client.client import GritClient
from grit_client.home import Home

ROOT = Path(__file__).parents[2]
GRIT = str(Path(sys.executable).with_name("grit"))
SHORT = {"epochs": 1, "max_steps": 6, "learning_rate": 0.004, "batch_size": 8, "seed": 3}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@dataclass
class Demo:
    home: Path
    output: str
    code: int


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[Demo]:
    """The finished demo and its running service."""
    home = tmp_path_factory.mktemp("demo") / ".grit"
    command = [sys.executable, "examples/demo.py", "--home", str(home), "--images", "60"]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    yield Demo(home=home, output=ran.stdout + ran.stderr, code=ran.returncode)
    subprocess.run([GRIT, "down", "--home", str(home)], check=True, timeout=120)
    assert left_over(home) == []


@pytest.fixture
def client(demo) -> Iterator[GritClient]:
    with GritClient(home=demo.home) as made:
        yield made


def left_over(home):
    """Processes that were started for a home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GRIT_HOME") == str(Home.at(home).folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def short_job(client, **changes):
    """Six steps of the digits example."""
    spec = json.loads((ROOT / "examples" / "jobs" / "digits.json").read_text())
    dataset = next(each for each in client.list_datasets() if each["num_rows"] > 1000)
    return spec | {"dataset": dataset["id"], "training": SHORT, "name": "short"} | changes


def test_the_demo_teaches_the_model_what_it_could_not_do(demo):
    assert demo.code == 0, demo.output
    assert "Passed" in demo.output
    for call in ("POST /models", "POST /datasets", "POST /jobs/plan", "POST /jobs", "POST /infer"):
        assert call in demo.output


def test_the_same_job_through_the_api_and_on_the_command_line_gives_the_same_bytes(
    client, tmp_path
):
    spec = short_job(client)
    job = client.create_job(spec)
    while job["status"] not in {"succeeded", "failed", "cancelled"}:
        job = client.get_job(job["id"], wait=30)
    assert job["status"] == "succeeded", job.get("error")
    through_api = client.download_adapter(job["result"]["adapter"], tmp_path / "api")
    path = tmp_path / "job.json"
    path.write_text(json.dumps(spec | {"model": str(ROOT / "examples" / "digits-vlm")}))
    rows = ROOT / "examples" / "digits" / "rotated-inverted-train.jsonl"
    command = [sys.executable, "-m", "grit_core", "train", str(path), "--dataset", str(rows)]
    subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        check=True,
        cwd=ROOT,
        timeout=300,
        capture_output=True,
    )
    by_hand = tmp_path / "out" / "adapter" / "adapter_model.safetensors"
    assert (Path(through_api) / "adapter_model.safetensors").read_bytes() == by_hand.read_bytes()


def test_a_local_folder_that_nobody_registered_can_be_named_in_a_job(client, tmp_path):
    folder = tmp_path / "copy-of-digits"
    folder.symlink_to(ROOT / "examples" / "digits-vlm")
    plan = client.plan(short_job(client, model=str(folder)))
    assert plan["trainable_parameters"] > 0


def test_the_jobs_curvature_is_told_by_layer_and_over_time(client):
    job = next(job for job in client.list_jobs() if job["name"] == "rotated-inverted-digits")
    layers = client.layers(job["id"])["layers"]
    observed = [layer for layer in layers if layer.get("effective_rank")]
    assert len(observed) == len(layers)
    assert all(1 <= layer["effective_rank"] <= layer["rank"] for layer in observed)
    series = client.metrics(job["id"])["series"]
    assert series["train_loss"][-1] < series["train_loss"][0] / 5


def test_the_answer_of_the_adapter_names_model_usage_and_timing(client):
    rows = ROOT / "examples" / "digits" / "rotated-inverted-heldout.jsonl"
    row = json.loads(rows.read_text().splitlines()[0])
    url = row["messages"][0]["content"][0]["image_url"]["url"]
    job = next(job for job in client.list_jobs() if job["name"] == "rotated-inverted-digits")
    answer = client.infer("Which digit is this?", images=[url], job=job["id"], max_new_tokens=4)
    assert answer["model"] == "digits-vlm"
    assert answer["adapter"] == job["result"]["adapter"]
    assert answer["usage"]["image_tokens"] == 16
    assert 0 < answer["timing"]["total_seconds"] < 30


def test_a_compacted_adapter_is_compressed_again_and_still_answers(client):
    spec = short_job(client)
    kept = client.upload_dataset(ROOT / "examples" / "digits" / "upright-heldout.jsonl")["id"]
    training = SHORT | {"max_steps": 30, "batch_size": 16, "compaction_max_kl": 1e-3}
    spec |= {"retention_dataset": kept, "training": training, "name": "compacted"}
    job = client.wait_for(client.create_job(spec)["id"], timeout_seconds=120)
    retention, cut = job["result"]["retention"], job["result"]["compaction"]
    assert retention["dataset"] == kept
    assert 0 < retention["loss_before"] < retention["loss_after"]
    assert cut["parameters_after"] <= cut["parameters_before"]
    assert cut["predicted_kl"] <= cut["max_kl"] == 1e-3
    adapter = client.get_adapter(job["result"]["adapter"])
    assert adapter["trainable_parameters"] == cut["parameters_after"]
    assert adapter["ranks"] == cut["ranks"]
    layers = client.layers(job["id"])["layers"]
    assert {each["name"]: each["compacted_rank"] for each in layers} == cut["ranks"]
    told = {event["type"] for event in client.events(job["id"])}
    assert {"retention_evaluated", "compacted"} <= told

    wanted = client.compress_adapter(adapter["id"], max_kl=0.1, num_rows=64, name="smaller")
    compression = client.wait_for(wanted["id"], timeout_seconds=120)
    again = compression["result"]["compaction"]
    smaller = client.get_adapter(compression["result"]["adapter"])
    assert again["parameters_before"] == cut["parameters_after"]
    assert smaller["trainable_parameters"] == again["parameters_after"] < cut["parameters_after"]
    assert (smaller["parent"], smaller["origin"]) == (adapter["id"], "compression")
    assert again["eval_loss_before"] == pytest.approx(cut["eval_loss_after"], rel=0.2)
    rows = ROOT / "examples" / "digits" / "rotated-inverted-heldout.jsonl"
    row = json.loads(rows.read_text().splitlines()[0])
    url = row["messages"][0]["content"][0]["image_url"]["url"]
    question = {"images": [url], "max_new_tokens": 4}
    answer = client.infer("Which digit is this?", adapter=smaller["id"], **question)
    assert answer["adapter"] == smaller["id"]
    assert answer["usage"]["completion_tokens"] >= 1
    by_job = client.infer("Which digit is this?", job=compression["id"], **question)
    assert (by_job["adapter"], by_job["output"]) == (answer["adapter"], answer["output"])
    # The same question of the same adapter: all but its last token was computed before.
    assert by_job["usage"]["cached_prompt_tokens"] == by_job["usage"]["prompt_tokens"] - 1


def test_the_calls_of_the_readme_work_with_curl_as_they_stand(demo, tmp_path):
    readme = (ROOT / "README.md").read_text()
    block = readme.partition("## The calls the demo makes")[2].partition("```sh\n")[2]
    commands = block.partition("```")[0].replace(".grit/", f"{demo.home}/")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = tmp_path / "examples" / "jobs" / "digits.json"
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | {"training": SHORT}))
    # The same model under the same id: what the demo registered is found again.
    commands = commands.replace("$PWD/examples/digits-vlm", f"{ROOT}/examples/digits-vlm")
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout.splitlines()[-1])
    assert answer["usage"]["completion_tokens"] >= 1
    assert "event: status_changed" in ran.stdout
    assert "problem" not in ran.stdout

"""`python -m grit_core`: the same training as the library's, and refusals that can be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from grit_core.__main__ import main
from grit_core.training import train
from grit_core.training_job import job_from_json, job_to_json
from tests.grit_core.training_jobs import tiny_job
from tests.tiny_models import tiny_chat_rows, tiny_vlm_folder, write_jsonl


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(8))
    return {
        "model": str(tiny_vlm_folder(tmp_path)),
        "dataset": "ds_of_the_service",
        "config": {
            "text": {"layer_patterns": ["model.text_model.layers.*.self_attn.q_proj"], "rank": 4}
        },
        "training": {"max_steps": 4, "batch_size": 2, "checkpoint_every_steps": 2},
        "device": "cpu",
        "name": "tiny",
    }


def run(tmp_path: Path, command: str, spec: dict[str, Any], *options: str) -> int:
    job = tmp_path / "job.json"
    job.write_text(json.dumps(spec))
    return main([command, str(job), *options])


def train_options(tmp_path: Path, output: str = "out") -> list[str]:
    rows, out = str(tmp_path / "rows.jsonl"), str(tmp_path / output)
    return ["--dataset", rows, "--output", out, "--threads", "1"]


def test_train_writes_an_adapter_and_says_where(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "train", spec, *train_options(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "step 4/4  loss" in printed
    assert f"Adapter in {tmp_path / 'out' / 'adapter'}" in printed
    assert (tmp_path / "out" / "adapter" / "grit.json").is_file()


def test_train_says_that_rows_are_checked_and_refuses_all_bad_ones_at_once(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "train", spec, *train_options(tmp_path)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Checked ")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[]\n" + path.read_bytes() + b"{}\n")
    assert run(tmp_path, "train", spec, *train_options(tmp_path, "other")) == 2
    told = capsys.readouterr().err
    assert "2 of " in told
    assert "rows.jsonl, line 1, /: A row is an object" in told
    assert f"rows.jsonl, line {len(path.read_bytes().splitlines())}, /messages: " in told


def test_events_can_be_had_as_json(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "train", spec, *train_options(tmp_path), "--json") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["type"] for event in events][-2:] == ["adapter_saved", "training_finished"]


def test_resume_goes_on_from_the_last_checkpoint(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "train", spec, *train_options(tmp_path, "whole"))
    run(tmp_path, "train", spec, *train_options(tmp_path, "twice"))
    newest = tmp_path / "twice" / "checkpoints" / "step-4"
    (newest / "state.json").write_bytes(b"{}")
    capsys.readouterr()
    assert run(tmp_path, "train", spec, *train_options(tmp_path, "twice"), "--resume") == 0
    printed = capsys.readouterr()
    assert "2 of 4 steps are done" in printed.out
    assert "step-4: state.json is torn or was altered" in printed.err
    weights = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "twice")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_command_line_and_a_job_over_the_wire_give_the_same_bytes(tmp_path: Path) -> None:
    job = job_from_json(json.dumps(job_to_json(tiny_job(tmp_path, num_rows=8))))
    list(train(job))
    spec = {
        "model": job.model,
        "eval_fraction": 0,
        "config": job_to_json(job)["config"],
        "training": job_to_json(job)["training"],
        "device": "cpu",
    }
    options = ["--dataset", str(job.dataset), "--output", str(tmp_path / "cli"), "--threads", "1"]
    assert run(tmp_path, "train", spec, *options) == 0
    ours = (tmp_path / "cli" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert ours == (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def test_plan_prints_the_layers_and_trains_nothing(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = str(tmp_path / "rows.jsonl")
    assert run(tmp_path, "plan", spec, "--dataset", rows) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in plan["layers"]] == [
        f"model.text_model.layers.{index}.self_attn.q_proj" for index in range(2)
    ]
    assert plan["num_rows"] == 7
    assert plan["estimate"]["total_steps"] == 4
    assert plan["training"]["precision"] == "float32"


def test_a_plan_of_layers_that_read_images_warns_of_rows_without_any(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    spec["vision_layers"] = ["model.vision_model.encoder.layers.0.self_attn.q_proj"]
    seen, text = tmp_path / "rows.jsonl", tmp_path / "text.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text.write_text("\n".join([json.dumps({"messages": chat})] * 4))
    for path, num_warnings in ((seen, 0), (text, 1)):
        assert run(tmp_path, "plan", spec, "--dataset", str(path)) == 0
        warnings = json.loads(capsys.readouterr().out)["warnings"]
        assert len([warning for warning in warnings if "no image" in warning]) == num_warnings


def test_what_the_rows_hold_and_is_not_read_is_said(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "source": "web"} for row in tiny_chat_rows(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    note = "rows.jsonl: The dataset has columns that are not read: source."
    assert run(tmp_path, "plan", spec, "--dataset", str(path)) == 0
    assert note in json.loads(capsys.readouterr().out)["warnings"]
    assert run(tmp_path, "train", spec, *train_options(tmp_path)) == 0
    assert note in capsys.readouterr().err


def test_probe_prints_what_a_registration_would_find_or_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_vlm_folder(tmp_path)
    assert main(["probe", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["probe"]["max_images"] == 2
    assert found["chat_format"]["end_of_turn"] == "<end_of_utterance>"
    (folder / "processor_config.json").unlink()
    assert main(["probe", str(folder)]) == 2
    assert "processor_config.json" in capsys.readouterr().err


def test_inventory_prints_a_models_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inventory", str(tiny_vlm_folder(tmp_path))]) == 0
    inventory = json.loads(capsys.readouterr().out)
    assert inventory["model_type"] == "idefics3"
    assert len(inventory["hash"]) == 64


def test_all_that_is_wrong_with_a_request_is_said_at_once(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    spec["training"] = {"epochs": -1, "precision": "float16"}
    spec["eval_fraction"] = 2
    spec["vision_layers"] = "model.vision_model"
    spec["config"]["text"]["rank"] = 4096
    spec["bogus"] = 1
    assert run(tmp_path, "train", spec, *train_options(tmp_path)) == 2
    complaints = capsys.readouterr().err
    for pointer in (
        "/training/epochs",
        "/training/precision",
        "/eval_fraction",
        "/vision_layers",
        "/config/text/rank",
        "/bogus",
    ):
        assert f"{pointer}:" in complaints


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "holds no JSON object"),
        ('{"a": NaN}', "is not strict JSON"),
        ('{"a": 1, "a": 2}', "is not strict JSON"),
        ("{}", "/model: model is missing"),
        ('{"model": "/nowhere"}', "/model: The model folder /nowhere does not exist"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.json").write_text(text)
    assert main(["plan", str(tmp_path / "job.json")]) == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_plan_that_has_changed_is_refused(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    spec["plan_hash"] = "0" * 64
    assert run(tmp_path, "train", spec, *train_options(tmp_path)) == 2
    assert "/plan_hash" in capsys.readouterr().err


def test_patterns_that_match_nothing_show_real_names(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    spec["config"]["text"]["layer_patterns"] = ["model.text_model.layer.*.q_proj"]
    assert run(tmp_path, "plan", spec) == 2
    assert "model.text_model.layers" in capsys.readouterr().err

"""The training job as JSON, and what importing it costs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from grit_core.training_job import job_from_json, job_to_json
from tests.grit_core.training_jobs import tiny_job


def test_a_job_survives_one_line_of_json(tmp_path: Path) -> None:
    job = dataclasses.replace(
        tiny_job(tmp_path),
        eval_dataset=tmp_path / "eval.jsonl",
        retention_dataset=tmp_path / "retention.jsonl",
    )
    line = json.dumps(job_to_json(job))
    assert "\n" not in line
    again = job_from_json(line)
    assert again == job
    assert again.plan.plan_hash == job.plan.plan_hash


def test_the_adapter_names_the_model_as_the_user_does(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    assert job.base_model_name == "tiny/model"
    assert dataclasses.replace(job, model_name=None).base_model_name == job.model


def test_planning_a_job_loads_no_torch() -> None:
    script = (
        "import sys, grit_core.training_job, grit_core.job_spec, grit_core.row_file;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)

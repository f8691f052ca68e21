"""The order of a compression: what may stand in it, and that it survives the wire."""

import dataclasses
import json
from pathlib import Path

import pytest

from grit_core.compression_job import (
    CompressionJob,
    compression_job_from_json,
    compression_job_to_json,
    validate,
)
from tests.grit_core.training_jobs import tiny_job


def a_job(**values: object) -> CompressionJob:
    job = CompressionJob(
        model="models/tiny",
        model_name=None,
        adapter=Path("adapter"),
        dataset=Path("rows.jsonl"),
        work_dir=Path("out"),
    )
    return dataclasses.replace(job, **values)


def test_a_job_survives_json() -> None:
    job = a_job(eval_dataset=Path("held-out.jsonl"), max_kl=1e-4, device="cuda:1")
    assert compression_job_from_json(json.dumps(compression_job_to_json(job))) == job
    assert compression_job_from_json(compression_job_to_json(a_job())) == a_job()


def test_so_do_the_plan_and_the_configuration_of_the_adapter(tmp_path: Path) -> None:
    trained = tiny_job(tmp_path)
    job = a_job(plan=trained.plan, config=trained.config)
    assert compression_job_from_json(json.dumps(compression_job_to_json(job))) == job


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("max_kl", 0.0, "above 0"),
        ("max_kl", -1e-3, "above 0"),
        ("max_kl", 11.0, "10"),
        ("max_kl", float("nan"), "10"),
        ("num_rows", 0, "1"),
        ("num_rows", 1.5, "whole number"),
        ("batch_size", 0, "1"),
        ("max_length", 4, "8"),
        ("seed", -1, "0"),
    ],
)
def test_a_number_out_of_bounds_is_named_with_its_bound(
    field: str, value: float, bound: str
) -> None:
    (fault,) = validate(a_job(**{field: value}))
    assert fault.pointer == f"/{field}"
    assert field in fault.detail
    assert bound in fault.detail


def test_the_numbers_that_are_taken_by_default_are_in_bounds() -> None:
    assert validate(a_job()) == []

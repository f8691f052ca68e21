"""The model and the data that come with the repository are what their cards say."""

import json
from pathlib import Path

import pytest

from examples.digits_images import Digits, load_split, rotate_and_invert
from examples.make_digits_data import files
from examples.train_digits_vlm import accuracy
from grit_core.job_spec import resolve_job
from grit_core.models.inventory import build_inventory

EXAMPLES = Path(__file__).parents[2] / "examples"


def some(digits, *, count):
    return Digits(digits.pictures[:count], digits.labels[:count], digits.indices[:count])


def test_the_data_files_come_out_the_same_byte_for_byte():
    for name, text in files().items():
        assert (EXAMPLES / "digits" / name).read_text(encoding="ascii") == text


def test_no_held_out_picture_is_among_those_trained_on():
    train, held_out = load_split()
    assert not set(train.indices.tolist()) & set(held_out.indices.tolist())
    assert len(train.indices) + len(held_out.indices) == 1797


@pytest.mark.slow
def test_the_model_reads_the_held_out_digits_it_was_made_for():
    _, held_out = load_split()
    assert accuracy(EXAMPLES / "digits-vlm", held_out) >= 0.95


@pytest.mark.slow
def test_the_model_cannot_read_what_the_demo_teaches_it():
    _, held_out = load_split()
    turned = Digits(rotate_and_invert(held_out.pictures), held_out.labels, held_out.indices)
    assert accuracy(EXAMPLES / "digits-vlm", some(turned, count=99)) <= 0.35


def test_the_digits_job_plans_on_the_model_it_names():
    spec = json.loads((EXAMPLES / "jobs" / "digits.json").read_text())
    inventory = build_inventory(EXAMPLES / "digits-vlm")
    resolved = resolve_job(spec, inventory, num_rows=1500, device="cpu")
    assert {layer.modality for layer in resolved.plan.layers} == {"vision", "text", "cross_modal"}
    assert resolved.plan.dropped == ()

"""The benchmark's subjects: rows kept apart, labels, corpora, and weights that repeat."""

import hashlib
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality import pilot
from benchmarks.quality.subjects import answers, digits, text
from examples.digits_images import load_split
from grit_core.data.encoder import IGNORED
from grit_core.models.inventory import inventory_of
from grit_core.plan import plan_adaptation

# Thousands of pictures go through the processor first.
PICTURES = [pytest.param(name, marks=pytest.mark.slow) for name in ("digits", "answers")]
EVERY_SUBJECT = [*PICTURES, "text"]


@pytest.fixture(scope="module")
def small_text(tmp_path_factory):
    """The text subject without its pretraining, which takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CACHE", tmp_path_factory.mktemp("weights"))
        yield text.subject(steps=0)


@pytest.fixture(scope="module")
def load(small_text):
    """Subjects by name, each loaded when first asked for."""
    loaders = {"digits": digits.subject, "answers": answers.subject, "text": lambda: small_text}
    return cache(lambda name: loaders[name]())


def key(row):
    """Tell rows apart by all that the model is shown, labels included."""
    tensors = [row.input_ids, row.labels, *(row.features[name] for name in sorted(row.features))]
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def picture(row, *, turned):
    """The grey levels of the handwritten original, whichever way it is shown."""
    pixels = row.features["pixel_values"][0, 0, 0]
    upright = torch.rot90(-pixels) if turned else pixels
    return bytes((upright.flatten() * 127.5 + 127.5).round().to(torch.uint8).tolist())


def answer_of(encoder, row):
    ids = row.labels[row.labels != IGNORED]
    return encoder.renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", EVERY_SUBJECT)
def test_what_is_measured_was_never_trained_on(load, name):
    subject = load(name)
    parts = [subject.train_rows, subject.selection_rows, subject.report_rows]
    parts.append(subject.retention_rows)
    keys = [{key(row) for row in rows} for rows in parts]
    assert all(keys)
    assert sum(map(len, keys)) == len(set.union(*keys))


@pytest.mark.parametrize("name", PICTURES)
def test_every_handwritten_digit_is_in_one_part_alone(load, name):
    subject, turned = load(name), name == "digits"
    new = [subject.train_rows, subject.selection_rows, subject.report_rows]
    pictures = [{picture(row, turned=turned) for row in rows} for rows in new]
    pictures.append({picture(row, turned=False) for row in subject.retention_rows})
    originals, _ = load_split()
    assert pictures[0] == {each.tobytes() for each in originals.pictures}
    assert sum(map(len, pictures)) == len(set.union(*pictures))


@pytest.mark.parametrize("name", EVERY_SUBJECT)
def test_rows_have_labels_and_a_run_has_rows_enough(load, name):
    subject = load(name)
    for rows in (subject.train_rows, subject.selection_rows, subject.report_rows):
        assert all((row.labels[1:] != IGNORED).any() for row in rows)
    assert len(subject.train_rows) >= 500
    assert len(subject.selection_rows) >= 64
    assert len(subject.report_rows) >= 64
    assert subject.num_steps % subject.eval_every == 0


@pytest.mark.parametrize("name", EVERY_SUBJECT)
def test_targets_fall_and_lie_below_what_the_base_model_does(load, name):
    subject = load(name)
    untrained = subject.loss(subject.base_model(), subject.report_rows)
    first, second, third = subject.targets
    assert untrained > first > second > third > 0


@pytest.mark.parametrize("name", EVERY_SUBJECT)
def test_the_plan_adapts_every_modality_that_the_subject_names(load, name):
    subject = load(name)
    plan = plan_adaptation(subject.config, inventory_of(subject.base_model()))
    for modality in subject.config.modalities():
        assert plan.of(modality)
    assert {layer.rank for layer in plan.layers} == {8}


@pytest.mark.parametrize("name", PICTURES)
def test_the_base_model_still_knows_its_own_task_and_not_the_new_one(load, name):
    subject = load(name)
    model = subject.base_model()
    assert subject.loss(model, subject.retention_rows) < 0.1
    assert subject.loss(model, subject.report_rows) > 1.0


@pytest.mark.parametrize("name", EVERY_SUBJECT)
def test_each_run_gets_weights_of_its_own(load, name):
    subject = load(name)
    first, second = subject.base_model(), subject.base_model()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert all(parameter.dtype == torch.float32 for parameter in second.parameters())
    assert any(parameter.any() for parameter in second.parameters())


@pytest.mark.slow
def test_answers_join_the_nines_complement_and_the_digit(load):
    encoder = answers.encoder()
    found = {answer_of(encoder, row) for row in load("answers").train_rows}
    assert found == {"90", "81", "72", "63", "54", "45", "36", "27", "18", "09"}
    kept = {answer_of(encoder, row) for row in load("answers").retention_rows}
    assert kept == {str(digit) for digit in range(10)}


def test_pretraining_never_sees_what_retention_measures(small_text):
    seen = {row.numpy().tobytes() for row in text.blocks("documentation.txt")[text.NUM_KEPT_BACK :]}
    kept = {row.input_ids.numpy().tobytes() for row in small_text.retention_rows}
    assert kept
    assert not kept & seen


def test_the_rows_of_a_corpus_are_all_its_bytes_in_an_order_of_their_own():
    rows = text.blocks("source.txt")
    data = (text.CORPUS / "source.txt").read_bytes()
    whole = [data[start : start + text.WIDTH] for start in range(0, len(data), text.WIDTH)]
    shuffled = [bytes(row.tolist()) for row in rows]
    assert sorted(shuffled) == sorted(part for part in whole if len(part) == text.WIDTH)
    assert shuffled != whole[: len(shuffled)]
    assert torch.equal(rows, text.blocks("source.txt"))


def test_the_corpora_are_the_texts_that_the_published_figures_are_of():
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in text.CORPUS.glob("*.txt")
    }
    assert digests["documentation.txt"].startswith("1c7ac670e959170e")
    assert digests["source.txt"].startswith("ad199f2ded3aa0f5")
    assert "PSF-LICENSE.txt" in digests


def test_pretraining_gives_the_same_bytes_again():
    first, again = (text.pretrain(steps=2).state_dict() for _ in range(2))
    fresh = text.llama().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], fresh["model.norm.weight"])


def test_pretrained_weights_are_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CACHE", tmp_path)
    made = text.pretrained(steps=1).state_dict()
    (path,) = tmp_path.glob("*.safetensors")
    marked = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(marked, path)
    found = text.pretrained(steps=1).state_dict()
    assert torch.equal(found["model.norm.weight"], made["model.norm.weight"] + 1)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    text.pretrained(steps=0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_weights_of_another_architecture_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CACHE", tmp_path)
    text.pretrained(steps=0)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)
    with pytest.raises(RuntimeError, match="delete it to train anew"):
        text.pretrained(steps=0)


def test_a_pilot_reads_its_targets_between_two_evaluations():
    curve = [{"step": step, "loss": loss} for step, loss in ((0.0, 2.0), (50.0, 1.0), (100.0, 0.8))]
    assert pilot.loss_at(curve, 0.4) == pytest.approx(1.2)
    assert pilot.loss_at(curve, 0.75) == pytest.approx(0.9)
    assert pilot.loss_at(curve, 1.0) == pytest.approx(0.8)


def test_a_pilots_target_is_the_lowest_loss_so_far_when_the_curve_has_risen_again():
    curve = [{"step": step, "loss": loss} for step, loss in ((0.0, 2.0), (50.0, 0.7), (100.0, 0.9))]
    assert pilot.loss_at(curve, 0.9) == pytest.approx(0.7)


def test_a_pilot_averages_its_seeds_point_by_point():
    curves = [[{"step": 0.0, "loss": loss}] for loss in (1.0, 2.0)]
    assert pilot.mean_curve(curves) == [{"step": 0.0, "loss": 1.5}]

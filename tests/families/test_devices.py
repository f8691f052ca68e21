"""Every family trains and answers on an accelerator as it does on the CPU.

The accelerator is the simulated one: it refuses what a card refuses (`tests.accelerator`).
"""

import dataclasses
import os
from pathlib import Path

import pytest

from grit_core.events import Evaluated, StepCompleted
from grit_core.training import train
from tests.families import chats
from tests.families.case import FamilyCase
from tests.families.cases import CASES
from tests.families.checks import Engine
from tests.families.subjects import random_adapter, training_job

pytestmark = [
    pytest.mark.usefixtures("accelerator"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # Transformers' own PaliGemmaProcessor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

FAST = {"idefics3", "qwen2_5_vl", "mllama", "llama", "gpt_oss", "mamba2"}
"""Of the default run: one of each kind. `make families` tries all of them."""
SERVED = [
    case
    for case in CASES
    if case.refusal is None and (case.name in FAST or os.environ.get("FAMILIES") == "full")
]
LOSS_TOLERANCE = 2e-4
"""Relative, after two steps: products are summed in another order there."""

DRAWN = {"opt", "gpt_bigcode", "phimoe"}
"""Their models draw random numbers in training (dropout, noise of a router), which come from the
device's own state there."""
DRAWN_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cases' models are built, each once."""
    return tmp_path_factory.mktemp("families")


def built(folders: Path, case: FamilyCase) -> Path:
    folder = folders / case.name
    if not folder.exists():
        folder.mkdir()
        case.build(folder)
    return folder


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_a_family_trains_on_an_accelerator_as_on_the_cpu(
    case: FamilyCase, folders: Path, tmp_path: Path
) -> None:
    folder = built(folders, case)
    rows = [
        {"messages": chats.lone_turn(count, number=n)}
        for n, count in enumerate(case.image_counts() * 2, 1)
    ]
    losses = {}
    for device in ("cpu", "sim"):
        job = training_job(folder, case, rows, work=tmp_path / device, batch_size=2, exactly=True)
        # Small steps: large ones make much of the last bits of a gradient.
        training = dataclasses.replace(job.training, learning_rate=1e-3)
        events = list(train(dataclasses.replace(job, device=device, training=training)))
        losses[device] = [e.train_loss for e in events if isinstance(e, StepCompleted)] + [
            e.eval_loss for e in events if isinstance(e, Evaluated)
        ]
    tolerance = DRAWN_TOLERANCE if case.name in DRAWN else LOSS_TOLERANCE
    assert losses["sim"] == pytest.approx(losses["cpu"], rel=tolerance)


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_a_family_answers_on_an_accelerator_as_on_the_cpu(case: FamilyCase, folders: Path) -> None:
    folder = built(folders, case)
    asked = [chats.lone_turn(count, number=2)[:1] for count in case.image_counts()]
    answers = {}
    for device in ("cpu", "sim"):
        with Engine(device=device) as engine:
            answers[device] = [
                engine.answer(folder, chat, adapter=source)
                for chat in (*asked, asked[0])  # the second time with what was kept of the first
                for source in (None, random_adapter(folder, case, seed=1))
            ]
    assert answers["sim"] == answers["cpu"]

"""What text families could hide from the checks that all families have in common."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from grit_core.artifacts import write_adapter
from grit_core.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_core.data.collate import collate
from grit_core.loss import label_loss_sum
from grit_core.models.inventory import build_inventory
from grit_core.models.pretrained import load_base_model
from grit_core.models.vlm_adapter import inject_lora, lora_layers
from grit_core.plan import plan_adaptation
from grit_core.serving.resident_model import ResidentModel
from tests.families import chats, checks, subjects
from tests.families import text_styles as styles
from tests.families.case import FamilyCase
from tests.families.text import CASES, HEADS, text_case

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SUPPORTED = [case for case in CASES if case.refused is None]

LIMIT_TOKENS = 80
"""Of windows and rotary frequencies; above the prompts that a model is tried with at loading."""

QUESTIONS = ("Say it. ", "Tell me more. " * 5, "Tell me all of it. " * 8)
"""Of fewer tokens than the limit, of about as many, and of more."""

LONGROPE = text_case(
    "phi3",
    styles.PHI3,
    variant="longrope",
    original_max_position_embeddings=LIMIT_TOKENS,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": LIMIT_TOKENS,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 8.0, 16.0],
        "factor": 8.0,
        "partial_rotary_factor": 0.5,
    },
)
LOCAL = text_case(
    "gpt_neo",
    styles.BASE,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=LIMIT_TOKENS,
    max_position_embeddings=2048,
)
SLIDING = text_case("olmo3", styles.OLMO, sliding_window=LIMIT_TOKENS, **HEADS)


def built(case: FamilyCase, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    case.build(folder)
    return folder


@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
def test_every_layer_of_the_inventory_trains_and_is_read_by_plain_peft(
    case: FamilyCase, tmp_path: Path
) -> None:
    folder = built(case, tmp_path / "model")
    inventory = build_inventory(folder)
    names = [layer.name for layer in inventory.layers if layer.block is not None]
    patterns = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names})
    config = ModelGRITConfig(text=ModalityConfig(layer_patterns=patterns, rank=1))
    model = inject_lora(load_base_model(folder), plan_adaptation(config, inventory)).train()
    rows = [row for n in (1, 2, 3) for row in subjects.encode(folder, chats.lone_turn(0, number=n))]
    batch = collate(rows, pad_token_id=subjects.encoder_for(folder).pad_token_id)
    label_loss_sum(model, batch).backward()
    layers = lora_layers(model)
    assert set(layers) == set(names)
    gradients = {name: layer.lora_B["default"].weight.grad for name, layer in layers.items()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.any()] == []

    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.normal_(0, 0.3)
        write_adapter(tmp_path / "adapter", model, base_model_name="tiny")
        expected = model.eval()(**batch.inputs).logits
        plain = PeftModel.from_pretrained(load_base_model(folder), str(tmp_path / "adapter"))
        torch.testing.assert_close(plain(**batch.inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [LONGROPE, LOCAL, SLIDING], ids=lambda case: case.name)
def test_rows_around_a_model_s_limit_are_answered_together_as_by_generate(
    case: FamilyCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(case, tmp_path)
    monkeypatch.setattr(checks, "NUM_ANSWER_TOKENS", 24)
    asked = [[chats.user_turn(text)] for text in QUESTIONS]
    expected = [checks._plain_answer(folder, case, chat) for chat in asked]
    with checks.Engine() as engine, ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda chat: engine.answer(folder, chat), asked)) == expected


def test_only_rows_within_the_limit_share_steps(tmp_path: Path) -> None:
    resident = ResidentModel.load(
        str(built(LONGROPE, tmp_path)),
        device=torch.device("cpu"),
        dtype="float32",
        num_slots=1,
        max_adapter_bytes=1 << 20,
        image_cache_bytes=0,
        prefix_cache_bytes=0,
    )
    assert resident.shares(LIMIT_TOKENS)
    assert not resident.shares(LIMIT_TOKENS + 1)


def test_a_short_row_has_its_own_loss_beside_one_that_changes_the_rotary_frequencies(
    tmp_path: Path,
) -> None:
    folder = built(LONGROPE, tmp_path)
    model = load_base_model(folder)
    rows = [
        row
        for text in QUESTIONS
        for row in subjects.encode(folder, [chats.user_turn(text), chats.answer("Grey.")])
    ]
    assert len(rows[0].input_ids) < LIMIT_TOKENS < len(rows[-1].input_ids)

    def loss(some: list[Any]) -> float:
        pad = subjects.encoder_for(folder).pad_token_id
        with torch.no_grad():
            return float(label_loss_sum(model, collate(some, pad_token_id=pad)))

    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows), rel=1e-5)
    assert loss(rows[::-1]) == pytest.approx(loss(rows), rel=1e-5)


@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
def test_answers_do_not_repeat_one_token(case: FamilyCase, tmp_path: Path) -> None:
    """A model that says the same to everything would pass every comparison of answers."""
    folder = built(case, tmp_path)
    asked = [chats.lone_turn(0, number=number)[:1] for number in (1, 2)]
    assert len({token for chat in asked for token in checks._plain_answer(folder, case, chat)}) > 1

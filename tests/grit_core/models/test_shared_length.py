from typing import Any

import pytest
from transformers import AutoConfig

from grit_core.models.shared_length import rope_limit, shared_length

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "factor": 32.0,
}


@pytest.mark.parametrize(
    ("model_type", "settings", "rope", "shared"),
    [
        ("llama", {}, None, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, None, None),
        ("phi3", {"rope_parameters": LONGROPE, "sliding_window": None}, 4096, 4096),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
                "max_position_embeddings": 512,
            },
            512,
            512,
        ),
        ("gpt_neo", {"window_size": 256}, None, 256),
        ("mistral", {"sliding_window": 100}, None, 100),
        ("mistral", {"sliding_window": None}, None, None),
    ],
)
def test_a_row_shares_steps_up_to_the_length_at_which_its_logits_change(
    model_type: str, settings: dict[str, Any], rope: int | None, shared: int | None
) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    assert rope_limit(config) == rope
    assert shared_length(config) == shared

"""Every family end to end: registration, plan, labels, training, plain PEFT, answers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import checks
from tests.families.case import FamilyCase
from tests.families.cases import CASES

FAST = (
    checks.check_registration,
    checks.check_plan,
    checks.check_labels,
    checks.check_rows_join_as_the_processor_does,
    checks.check_batch_loss_is_sum_of_lone_rows,
    checks.check_answers_equal_generate,
    checks.check_mixed_training,
)
"""Of the default run."""
SLOW = (
    checks.check_plain_peft_equals,
    checks.check_three_steps,
    checks.check_mixed_batch,
)
"""Added by `make families`."""
CHECKS = (*FAST, *SLOW) if os.environ.get("FAMILIES") == "full" else FAST

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # Transformers' own PaliGemmaProcessor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FamilyCase], Path]:
    """Builds a case's folder once a session."""
    root = tmp_path_factory.mktemp("families")

    def build(case: FamilyCase) -> Path:
        folder = root / case.name
        if not folder.exists():
            folder.mkdir()
            case.build(folder)
        return folder

    return build


def _pairs() -> list[object]:
    return [
        pytest.param(case, check, id=f"{case.name}-{check.__name__.removeprefix('check_')}")
        for case in CASES
        for check in CHECKS
        if case.refusal is None or check is checks.check_registration
    ]


@pytest.mark.parametrize(("case", "check"), _pairs())
def test_a_family_works_end_to_end(
    case: FamilyCase,
    check: Callable[[Path, FamilyCase], None],
    model_folder: Callable[[FamilyCase], Path],
) -> None:
    check(model_folder(case), case)


def test_no_two_cases_share_a_name() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))

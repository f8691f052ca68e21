"""The mirrors agree with the dataclasses that they mirror."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import api
from api.errors import KINDS
from api.schemas.config import MIRRORS
from grit_core.config.bounds import Number
from grit_core.config.model_configs import MODALITY_CHECKS, MODEL_CHECKS
from grit_core.config.training import TRAINING_CHECKS

CHECKS = dict(
    zip(
        [schema for _, schema in MIRRORS],
        [MODALITY_CHECKS, MODEL_CHECKS, TRAINING_CHECKS],
        strict=True,
    )
)


def defaults_of_dataclass(source: Any) -> dict[str, Any]:
    built = source()
    return {field.name: getattr(built, field.name) for field in dataclasses.fields(source)}


def defaults_of_schema(schema: type[BaseModel]) -> dict[str, Any]:
    built = schema()
    return {name: getattr(built, name) for name in schema.model_fields}


@pytest.mark.parametrize(
    ("source", "schema"), MIRRORS, ids=[source.__name__ for source, _ in MIRRORS]
)
def test_a_mirror_has_the_fields_and_defaults_of_its_dataclass(
    source: type, schema: type[BaseModel]
) -> None:
    assert defaults_of_schema(schema) == defaults_of_dataclass(source)
    assert list(schema.model_fields) == [field.name for field in dataclasses.fields(source)]


@pytest.mark.parametrize(
    ("schema", "name", "check"),
    [
        pytest.param(schema, name, check, id=f"{schema.__name__}.{name}")
        for schema, checks in CHECKS.items()
        for name, check in checks.items()
        if isinstance(check, Number)
    ],
)
def test_a_number_is_held_to_the_bounds_of_its_dataclass(
    schema: type[BaseModel], name: str, check: Number
) -> None:
    step = 1 if check.integer else 1e-9 + abs(check.high) * 1e-9
    outside = [check.low if check.above_low else check.low - step]
    outside.append(check.high if check.below_high else check.high + step)
    for value in outside:
        with pytest.raises(ValidationError):
            schema.model_validate({name: int(value) if check.integer else float(value)})
    with pytest.raises(ValidationError):
        schema.model_validate({name: str(check.high)})
    with pytest.raises(ValidationError):
        schema.model_validate({name: True})
    inside = check.high if not check.below_high else (check.low + check.high) / 2
    assert schema.model_validate({name: int(inside) if check.integer else inside})


def test_every_problem_that_is_raised_has_its_kind() -> None:
    sources = Path(api.__path__[0]).rglob("*.py")
    named = {
        code
        for source in sources
        for code in re.findall(
            r"(?:Problem|TooLarge)\(\s*\"([a-z_]+)\"", source.read_text(encoding="utf-8")
        )
    }
    assert named - KINDS.keys() == set()
    assert len(named) > 20

"""Planning must not cost anyone an import of torch: each claim in a fresh interpreter."""

import subprocess
import sys

import pytest

import grit_core
from grit_core.config.model_configs import ModelGRITConfig

TORCH_FREE = [
    "grit_core",
    "grit_core.checkpoint_files",
    "grit_core.compression_job",
    "grit_core.config",
    "grit_core.config.training",
    "grit_core.errors",
    "grit_core.events",
    "grit_core.patterns",
    "grit_core.plan",
    "grit_core.models.inventory",
    "grit_core.selection",
]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_fresh_import_loads_no_torch(module: str) -> None:
    code = (
        f"import sys, {module};"
        "print([n for n in ('torch', 'transformers', 'peft', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_the_promised_names_can_be_imported_from_the_root() -> None:
    assert set(grit_core.__all__) <= set(dir(grit_core))
    assert grit_core.ModelGRITConfig is ModelGRITConfig


def test_a_name_that_was_not_promised_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ModelGritConfig'"):
        _ = grit_core.ModelGritConfig

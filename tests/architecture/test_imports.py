"""What each package loads in a fresh interpreter."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate")


def modules_loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a statement loads in a new interpreter."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement",
    [
        "import api.app; api.app.create_app",
        "import store.jobs, store.attempts, store.queue, store.inference, store.objects",
        "import grit_client.cli",
        "import grit_core, grit_core.config, grit_core.plan, grit_core.job_spec, grit_core.records",
    ],
    ids=["api", "store", "grit_client", "grit_core"],
)
def test_a_package_above_the_library_loads_no_torch(statement: str) -> None:
    assert modules_loaded_by(statement).isdisjoint(HEAVY)


def test_the_api_loads_neither_the_worker_nor_what_only_uploads_need() -> None:
    loaded = modules_loaded_by("import api.app")
    assert loaded.isdisjoint({"worker", "grit_client", "PIL", "pyarrow"})


def test_the_client_loads_nothing_of_the_service() -> None:
    loaded = modules_loaded_by("import grit_client.cli")
    assert loaded.isdisjoint({"api", "worker", "store", "sqlalchemy", "celery", "pydantic"})


def test_the_library_loads_nothing_of_the_service() -> None:
    loaded = modules_loaded_by("import grit_core, grit_core.plan, grit_core.job_spec")
    assert loaded.isdisjoint({"api", "worker", "store", "fastapi", "sqlalchemy", "pydantic"})

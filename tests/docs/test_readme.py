"""The session of README, followed to the letter over short examples."""

import pytest

from tests.docs.conftest import Reader
from tests.docs.running import run_page

NUM_ROWS = 40


@pytest.mark.slow
@pytest.mark.e2e
def test_the_calls_of_the_page_work_one_after_another(reader: Reader) -> None:
    reader.run("grit", "up", "--detach")
    ran = run_page(
        "README.md", reader.folder, reader.environment, left_out=r"^make ", one_python=True
    )
    assert len(ran) == 5
    session, terminal, _, asked, local = (each.output for each in ran)
    assert session.startswith('{"id":"digits-vlm"')
    assert '"plan_hash"' in session
    assert '"to":"succeeded"' in session
    assert '"finish_reason"' in session
    assert "succeeded" in terminal
    assert asked.strip()
    assert (reader.folder / "out" / "adapter" / "adapter_model.safetensors").exists(), local

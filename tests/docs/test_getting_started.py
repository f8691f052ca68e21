"""docs/getting-started.md, followed to the letter."""

import re

import pytest

from tests.docs.conftest import Reader
from tests.docs.running import run_page, shows

NUM_ROWS = 400
"""As many as the page reads."""


@pytest.mark.slow
@pytest.mark.e2e
def test_the_page_leads_from_own_data_to_an_answering_adapter(reader: Reader) -> None:
    ran = run_page("docs/getting-started.md", reader.folder, reader.environment)
    assert len(ran) >= 11
    assert all(each.expected is not None for each in ran if each.block.language == "sh")
    text = "\n".join(each.output for each in ran)
    base, adapter = (
        int(re.findall(rf"{name}: (\d+) of 40 right", text)[0])
        for name in ("base model", "adapter")
    )
    assert base <= 12
    assert adapter >= 24
    assert (reader.folder / "my-adapter" / "adapter_model.safetensors").stat().st_size > 10_000


def test_an_output_is_compared_line_by_line() -> None:
    assert shows("a   1\n\nb 2\n", "a 1\nb 2")
    assert shows("a 1\nx\ny\nb 2 of 3\n", "a ...\n...\nb ... of 3")
    assert not shows("a 1\nb 2\nc 3\n", "a 1\nb 2")
    assert not shows("b 2\n", "a 1\nb 2")

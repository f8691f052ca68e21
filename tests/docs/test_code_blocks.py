"""The Python and JSON of README and docs/: it is valid, and the client has the calls it shows.

What runs whole: README (`test_readme`), getting-started (`test_getting_started`), the scripts of
data (`test_data_guide`), configuration (`test_configuration_guide`) and openai
(`tests/api/openai/test_docs`).
"""

import ast
import inspect
import json
from collections.abc import Iterator

import pytest

from grit_client.client import GritClient
from tests.docs.pages import PAGES, Block, load_blocks


def blocks(page: str, language: str) -> list[Block]:
    return [each for each in load_blocks(page) if each.language == language]


def calls(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Find the calls of a `client`, with the names of their arguments."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "client"
        ):
            yield node.func.attr, [each.arg for each in node.keywords if each.arg]


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_compiles(page: str) -> None:
    for block in blocks(page, "python"):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compile(block.text, block.place, "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/openai.md"])
def test_every_call_of_the_client_is_one_that_it_has(page: str) -> None:
    for block in blocks(page, "python"):
        for name, arguments in calls(ast.parse(block.text)):
            method = getattr(GritClient, name, None)
            assert method is not None, f"{block.place}: GritClient has no {name}"
            parameters = inspect.signature(method).parameters
            open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
            unknown = set(arguments) - parameters.keys()
            assert open_ended or not unknown, f"{block.place}: {name} takes no {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_every_json_block_is_json(page: str) -> None:
    for block in blocks(page, "json"):
        try:
            json.loads(block.text)
        except ValueError:
            for line in block.text.splitlines():  # JSONL
                json.loads(line)

"""Every command that README and docs/ name exists, with every option that they give it."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main

from grit_client.cli import app
from tests.docs.pages import PAGES, ROOT, Word, load_commands

_TARGETS: Final = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
_GRIT: Final = typer.main.get_command(app)
_ENDS: Final = frozenset({"|", "||", "&&", ";", "&", ">", ">>", "<", "2>&1", "(", ")"})


def calls(page: str, program: str) -> Iterator[tuple[Word, list[str]]]:
    """Find the calls of a program in a page's commands, with their arguments."""
    for word in load_commands(page):
        for part in re.split(r"\$\(|\||&&|;|\)", word.text):
            tokens = _tokens(part)
            for index, token in enumerate(tokens[:2]):
                if token == program or token.endswith(f"/bin/{program}"):
                    yield word, _arguments(tokens[index + 1 :])
                    break


def _tokens(text: str) -> list[str]:
    plain = re.sub(r"(^|\s)#.*", "", text)
    plain = re.sub(r"^(?:\s*[A-Z_]+=\S*)+\s", "", plain)  # variables before a command
    try:
        return shlex.split(plain)
    except ValueError:  # a part of a longer quotation
        return plain.split()


def _arguments(tokens: list[str]) -> list[str]:
    end = next((index for index, token in enumerate(tokens) if token in _ENDS), len(tokens))
    return tokens[:end]


def fault(command: Any, arguments: list[str]) -> str | None:
    """Return what is wrong with the arguments of a click command, or nothing."""
    name = "grit"
    rest = list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        # `keys create|rotate` and `teams show` name several; each is checked.
        wanted = rest.pop(0)
        if wanted in {"...", "COMMAND"}:
            return None
        if wanted not in command.commands:
            return f"{name} has no command {wanted!r}; it has {', '.join(sorted(command.commands))}"
        name, command = f"{name} {wanted}", command.commands[wanted]
    known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    known |= {"--help", "-h"}
    unknown = [
        token
        for token in rest
        if re.match(r"--?[a-zA-Z]", token) and token.partition("=")[0] not in known
    ]
    if unknown:
        return f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_call_of_grit_is_one_that_it_takes(page: str) -> None:
    faults = [
        f"{word.place}: {wrong}"
        for word, arguments in calls(page, "grit")
        if (wrong := fault(_GRIT, arguments))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_exists(page: str) -> None:
    faults = [
        f"{word.place}: make has no target {arguments[0]}"
        for word, arguments in calls(page, "make")
        if arguments and arguments[0] not in _TARGETS
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_python_runs_exists_and_has_the_options(page: str) -> None:
    faults = []
    for program in ("python", "python3"):
        for word, arguments in calls(page, program):
            if arguments[:1] != ["-m"] or len(arguments) < 2:
                continue
            module, rest = arguments[1], arguments[2:]
            if module == "celery":
                continue  # looked at below
            text = _source(module)
            if text is None:
                faults.append(f"{word.place}: there is no module {module}")
                continue
            faults += [
                f"{word.place}: python -m {module} has no {token}"
                for token in _option_words(rest)
                if not _has(text, token)
            ]
    assert not faults, "\n".join(faults)


@cache
def _source(module: str) -> str | None:
    """Return the source of what `python -m` runs, with the modules beside it."""
    path = ROOT / Path(*module.split("."))
    is_package = (path / "__main__.py").is_file()
    if not is_package and not path.with_suffix(".py").is_file():
        return None
    folder = path if is_package else path.parent
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py")))


def _option_words(arguments: list[str]) -> list[str]:
    """Options, and the commands before them."""
    found: list[str] = []
    for token in arguments:
        if token.startswith("--"):
            found.append(token.partition("=")[0])
        elif not found and re.fullmatch(r"[a-z]+(\|[a-z]+)*", token):
            found += token.split("|")
    return found[:1] + [each for each in found[1:] if each.startswith("--")]


def _has(source: str, word: str) -> bool:
    option = word.removeprefix("--").replace("-", "_")
    return f'"{word}"' in source or re.search(rf"\b{re.escape(option)}\b", source) is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_call_of_celery_is_one_that_it_takes(page: str) -> None:
    from celery.bin.celery import celery  # noqa: PLC0415 - only here, and it takes a second

    faults = []
    found = list(calls(page, "celery"))
    found += [
        (word, arguments[2:])
        for word, arguments in calls(page, "python")
        if arguments[:2] == ["-m", "celery"]
    ]
    for word, arguments in found:
        rest = arguments[2:] if arguments[:1] == ["-A"] else arguments
        if wrong := fault(celery, rest):
            faults.append(f"{word.place}: {wrong}")
    assert not faults, "\n".join(faults)


def test_the_pages_have_commands() -> None:
    found = [arguments for page in PAGES for _, arguments in calls(page, "grit")]
    assert len(found) > 30
    assert ["up", "--detach"] in found


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["upload", "x"], "no command 'upload'"),
        (["datasets", "put", "x"], "no command 'put'"),
        (["up", "--detached"], "no option --detached"),
        (["up", "--detach"], None),
    ],
)
def test_a_call_that_grit_does_not_take_is_found(
    arguments: list[str], complaint: str | None
) -> None:
    found = fault(_GRIT, arguments)
    assert (found is None) if complaint is None else (found is not None and complaint in found)

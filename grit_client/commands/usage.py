"""Mistakes in a command line: one line that names the mistake and the nearest that exists."""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

import typer
from typer.core import TyperGroup

from grit_client.terminal_text import printable

REFUSED: Final = 2
_EXPECTED: Final = {
    "int_parsing": "a whole number",
    "float_parsing": "a number",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than_equal": "a number of at most {le:g}",
    "bool_parsing": "true or false",
}
"""What to give, by pydantic's name of the fault."""
_EXTRA: Final = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.+)\)\.?", re.DOTALL)
INTERRUPTED: Final = 130
READER_GONE: Final = 141
"""What a shell says of a program that SIGPIPE ended."""

SYNONYMS: Final = {
    "train": "submit",
    "run": "submit",
    "create": "submit",
    "finetune": "submit",
    "fine-tune": "submit",
    "ls": "jobs",
    "list": "jobs",
    "ps": "jobs",
    "log": "logs",
    "follow": "watch",
    "serve": "up",
    "ask": "infer",
    "generate": "infer",
    "predict": "infer",
    "upload": "datasets upload",
    "dataset": "datasets list",
    "model": "models list",
    "adapter": "adapters list",
    "key": "keys list",
    "team": "teams show",
    "health": "status",
    "stop": "down",
    "kill": "cancel",
    "get": "job",
    "show": "job",
    "rm": "delete",
    "remove": "delete",
    "add": "upload",
}
"""Words of other command lines, and the command that does it here."""


class CommandGroup(TyperGroup):
    """A group that names the nearest command when it has not the one that was typed."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; see typer."""
        typed = args[0] if args else ""
        if not typed.startswith("-") and self.get_command(ctx, typed) is None:
            ctx.fail(f"There is no command {typed!r}.{self._hint(ctx, typed)}")
        return super().resolve_command(ctx, args)

    def _hint(self, ctx: Any, typed: str) -> str:
        known = list(self.commands)
        meant = {word: word for word in known}
        meant |= {
            word: command
            for word, command in SYNONYMS.items()
            if word not in meant and command.split()[0] in known
        }
        nearest = get_close_matches(typed, meant, n=1)
        if nearest:
            return f" Did you mean `{ctx.command_path} {meant[nearest[0]]}`?"
        return f" The commands: {', '.join(known)}."


def report_usage(error: typer.exceptions.TyperException, *, arguments: Sequence[str]) -> int:
    """Write a mistake in a command line to standard error, and return its exit code.

    Args:
        error: What typer found.
        arguments: The command line, which may ask for JSON.
    """
    ctx = getattr(error, "ctx", None)
    text = printable(_describe(error, arguments))
    if "--json" in arguments:
        document = {"exit_code": REFUSED, "title": "UsageError", "detail": text, "errors": []}
        sys.stderr.write(json.dumps(document, indent=2) + "\n")
        return REFUSED
    typer.secho(f"error: {text}", err=True, fg="red")
    if ctx is not None:
        usage = " ".join(ctx.get_usage().split())
        typer.secho(f"{usage}   ({ctx.command_path} -h explains it)", err=True, dim=True)
    return REFUSED


def _describe(error: typer.exceptions.TyperException, arguments: Sequence[str]) -> str:
    possible = getattr(error, "possibilities", None)
    if possible is not None or type(error).__name__ == "NoSuchOption":
        return _describe_unknown_option(error, possible or (), arguments)
    param = getattr(error, "param", None)
    if not isinstance(error, typer.BadParameter) or not error.message:
        return _describe_extra_arguments(error) or error.format_message()
    name = error.param_hint if param is None else _name(param)
    words = f"{_rephrase(error)}{_nearest_choice(error.message)}"
    if words.startswith("is "):
        return f"{name} {words}"
    return f"{name}: {words}" if isinstance(name, str) else words


def _describe_unknown_option(
    error: typer.exceptions.TyperException, possible: Iterable[str], arguments: Sequence[str]
) -> str:
    """Name the command that has the option, where one was typed, or the nearest."""
    option = str(getattr(error, "option_name", ""))
    group: Any = getattr(error, "ctx", None)
    commands: Mapping[str, Any] = getattr(getattr(group, "command", None), "commands", {})
    for word in arguments:
        if any(option in param.opts for param in getattr(commands.get(word), "params", ())):
            place = f"{group.command_path} {word}"
            return f"{option} belongs after its command: {place} {option} ..."
    names = {name.lstrip("-"): name for name in possible}
    nearest = get_close_matches(option.lstrip("-"), names, n=1)
    hint = f" Did you mean {names[nearest[0]]}?" if nearest else ""
    return f"There is no option {option}.{hint}"


def _describe_extra_arguments(error: typer.exceptions.TyperException) -> str | None:
    """Say what is too much, and that a text of several words takes quotes."""
    found = _EXTRA.fullmatch(error.format_message())
    ctx: Any = getattr(error, "ctx", None)
    if found is None or ctx is None:
        return None
    takes = [each for each in ctx.command.params if each.param_type_name == "argument"]
    if not takes:
        return f"`{ctx.command_path}` takes no argument; {found[1]!r} is too much."
    first = takes[-1].name
    return (
        f"`{ctx.command_path}` takes no argument after its {first}; {found[1]!r} is too much. Put a"
        " text with spaces in quotes, and an option before each of its values."
    )


def _name(param: Any) -> str:
    options: Iterable[str] = getattr(param, "opts", ())
    long = [name for name in options if name.startswith("--")]
    return long[0] if long else str(param.name).upper()


def _rephrase(error: typer.BadParameter) -> str:
    """Return what is wrong with a value: the value, and what to give."""
    found: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    first = found[0] if found else {}
    expected = _EXPECTED.get(str(first.get("type")))
    if expected is None:
        typed, *choices = re.findall(r"'([^']*)'", error.message) or [""]
        if choices and " is not one of " in error.message:
            return f"{typed!r} is not one of {', '.join(choices)}."
        return f"{error.message.removeprefix('Value error, ').rstrip('.')}."
    bound = first.get("ctx") or {}
    return f"is {first.get('input')!r}; give {expected.format(**bound)}."


def _nearest_choice(message: str) -> str:
    """Return a question with the nearest of the choices that a message lists, or nothing."""
    typed, *choices = re.findall(r"'([^']*)'", message) or [""]
    nearest = get_close_matches(typed.lower(), choices, n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def discard_output() -> None:
    """Write no more to standard output, which Python flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_unwritable(error: OSError) -> int:
    """Write why standard output takes no more to standard error, and return the exit code."""
    typer.secho(f"error: The output cannot be written: {error.strerror}.", err=True, fg="red")
    return REFUSED

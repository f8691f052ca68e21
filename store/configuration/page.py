"""docs/settings.md, written from the settings themselves."""

import inspect
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from pydantic_settings import BaseSettings

from store.configuration.faults import CLIENT_VARIABLES, is_secret, variable_name

_SECTION: Final = re.compile(r"    # --- (.+)")
_QUOTED: Final = re.compile(r"`(\w+)`")
_FIELD: Final = re.compile(r"    (\w+): ")
_MOST_SECONDS: Final = 315_360_000
"""Said once, at the head of the page."""
_UNITS: Final = {1024**3: "GiB", 1024**2: "MiB", 1024: "KiB"}
_HEAD: Final = """# Settings

<!-- Written by `make settings` from store/settings.py. Do not edit it here. -->

The API, the workers and `python -m store` read these variables when they start. A process that
finds a wrong value, or a `GRIT_*` variable that is not on this page, says so on standard error and
ends with status 2:

```text
store: GRIT_HEARTBEAT_SECOND is not a setting; did you mean GRIT_HEARTBEAT_SECONDS?
store: GRIT_POOL_SIZE is 'ten'; it must be a whole number above 0
```

- An empty variable counts as unset.
- Every setting can be in a file instead: `grit_<setting>` in the folder `GRIT_SECRETS_FOLDER`.
  Variables win over files. Line ends at the end of a file are left out; other blanks belong to the
  value.
- The values of secrets, and of URLs that may hold one, are in no message.
- Seconds may have a fraction. Where no bound is given, they are at most 315,360,000 (ten years).
- Lists are JSON: `GRIT_ALLOWED_MODELS='["org/*", "/models/*"]'`.
- Every process of a service needs the same settings, except `GRIT_HOME` and what depends on its
  machine.

`CLIENT` belong to the command line `grit` and are ignored here. So is what Kubernetes
sets for a Service whose name begins with `grit`.
"""


def render_page(settings_class: type[BaseSettings]) -> str:
    """Return the page: a table of settings for each section of the class."""
    schema = settings_class.model_json_schema()["properties"]
    client = " and ".join(f"`{name}`" for name in CLIENT_VARIABLES)
    lines = [_HEAD.replace("`CLIENT`", client)]
    for section, fields in _read_sections(settings_class):
        lines += [f"## {section[0].upper()}{section[1:]}", ""]
        lines += ["| variable | value | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            info = settings_class.model_fields[field]
            meaning = " ".join((info.description or "").split()).replace("|", "\\|")
            meaning = _QUOTED.sub(partial(_name_variable, settings_class), meaning)
            if is_secret(settings_class, field):
                meaning += " Never shown."
            name, value = variable_name(field), _render_type(schema[field])
            lines.append(f"| `{name}` | {value} | {_render_default(info.default)} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _name_variable(settings_class: type[BaseSettings], found: re.Match[str]) -> str:
    """Return a quoted name as the variable that it stands for, if it is a setting."""
    is_setting = found[1] in settings_class.model_fields
    return f"`{variable_name(found[1])}`" if is_setting else found[0]


def _read_sections(settings_class: type[BaseSettings]) -> Iterator[tuple[str, list[str]]]:
    """Yield the class's sections, which are comments in its source, with their fields."""
    section, fields = "home", list[str]()
    for line in inspect.getsource(settings_class).splitlines():
        begins, names = _SECTION.fullmatch(line), _FIELD.match(line)
        if begins:
            if fields:
                yield section, fields
            section, fields = begins[1], []
        elif names and names[1] in settings_class.model_fields:
            fields.append(names[1])
    yield section, fields


def _render_type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        schema = next(each for each in schema["anyOf"] if each["type"] != "null")
    kind = {"integer": "whole number", "number": "number", "array": "JSON list"}.get(
        schema["type"], schema.get("format", "text")
    )
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {_render_number(schema[key])}"
        for key, sign in signs.items()
        if key in schema and schema[key] != _MOST_SECONDS
    ]
    return ", ".join([{"password": "secret"}.get(kind, kind), *bounds])


def _render_default(value: object) -> str:
    if value is None or value == "":
        return "unset"
    if isinstance(value, int | float):
        return _render_number(value)
    return f"`{value}`"


def _render_number(value: float) -> str:
    for size, unit in _UNITS.items():
        if isinstance(value, int) and value and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value:,.15g}"

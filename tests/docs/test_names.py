"""Every file, path of the API, setting and name of the code that README and docs/ name exists."""

import re
from functools import cache
from typing import Final

import pytest

from api.openapi import snapshot
from grit_core.config import preset_names
from store.settings import Settings
from tests.docs.pages import PAGES, ROOT, load, load_blocks, load_words

_IGNORED: Final = {
    line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
}
_TOP: Final = sorted(
    path.name
    for path in ROOT.iterdir()
    if not path.name.startswith(".") and path.name not in _IGNORED
)
_SOURCES: Final = frozenset({".py", ".toml", ".yml", ".json", ".lock", ".sh", ""})
_FILE: Final = re.compile(
    rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, _TOP))})/[\w./*-]*\w|[\w.-]+\.(?:md|toml|yml|lock))"
)
_METHOD: Final = re.compile(r"\b(GET|HEAD|POST|PUT|PATCH|DELETE) (/[\w/{}.-]*)")
_SETTING: Final = re.compile(r"\bGRIT_[A-Z0-9_]+")
_FOREIGN: Final = frozenset({"README.md"})
"""Names of files that stand in folders of users."""
_FOREIGN_NAMES: Final = frozenset({"from_float", "grit_vlm", "min_p", "x_proj"})
"""Names of libraries that the code does not call."""
_OF_THE_MACHINE: Final = re.compile(r"/(dev|etc|home|proc|run|sys|tmp|usr|var)\b")
_NOT_SERVED: Final = frozenset({
    *("/chat/completions", "/v1/v1/models", "/openai/v1/files"),
    *("/v1/completions", "/v1/responses", "/v1/embeddings"),
    "/grit",  # the example of a proxy's prefix
})
"""Paths that a page names because the API does not have them."""
_PUBLIC_PAGES: Final = {"/docs": {"get"}, "/docs/{name}": {"get"}, "/openapi.json": {"get"}}


@cache
def _code() -> str:
    """All of the repository's own code and configuration."""
    left_out = (ROOT / "tests" / "docs", ROOT / "benchmarks" / "results", ROOT / "docs")
    found = []
    for top in _TOP:
        path = ROOT / top
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            is_ours = not any(file.is_relative_to(folder) for folder in left_out)
            if is_ours and file.is_file() and file.suffix in _SOURCES:
                found.append(file.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(found)


@cache
def _names() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", _code()))


@cache
def _made_names() -> frozenset[str]:
    """Names that the code puts together."""
    return frozenset({*preset_names(), *_FOREIGN_NAMES})


def _is_secret(name: str) -> bool:
    """Tell whether a name is that of a setting's file under /run/secrets."""
    return name.removeprefix("grit_") in Settings.model_fields


@cache
def _paths() -> dict[str, set[str]]:
    document = snapshot()
    found = {path: set(methods) for path, methods in document["paths"].items()}
    return found | _PUBLIC_PAGES


def knows_path(path: str, method: str | None = None) -> bool:
    """Tell whether the API has a path; `{id}`, `...` and ids stand for its parameters."""
    wanted = path.split("?", maxsplit=1)[0].strip("/").split("/")
    for known, methods in _paths().items():
        parts = known.strip("/").split("/")
        if len(parts) == len(wanted) and all(map(_fits, parts, wanted)):
            if method is None or method.lower() in methods:
                return True
            if method == "HEAD" and "get" in methods:
                return True
    return False


def _fits(known: str, wanted: str) -> bool:
    return known == wanted or known.startswith("{")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    texts = [(word.place, word.text) for word in load_words(page)]
    texts += [
        (block.place, line)
        for block in load_blocks(page)
        if block.language in {"sh", "bash"}
        for line in block.text.splitlines()
    ]
    missing = []
    for place, text in texts:
        for name in _FILE.findall(text):
            if name in _FOREIGN or (
                "/" not in name and name not in _TOP and (ROOT / "docs" / name).exists()
            ):
                continue
            if not any(ROOT.glob(name.rstrip("/"))):
                missing.append(f"{place}: {name}")
    assert not missing, f"there is no {'; no '.join(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_the_api_that_a_page_names_exists(page: str) -> None:
    text = load(page)
    faults = [
        f"{method} {path}"
        for method, path in _METHOD.findall(text)
        if not knows_path(path.rstrip("."), method)
    ]
    for word in load_words(page):
        if (
            re.fullmatch(r"/[a-z][\w/{}-]*", word.text)
            and not _OF_THE_MACHINE.match(word.text)
            and word.text not in _NOT_SERVED
            and not knows_path(word.text)
        ):
            prefix = any(known.startswith(f"{word.text}/") for known in _paths())
            if not prefix:
                faults.append(f"{word.place}: {word.text}")
    faults += [
        f"curl {path}"
        for block in load_blocks(page)
        if block.language in {"sh", "bash"}
        for path in re.findall(r"\$\{?URL\}?(/[\w/$?{}-]*)", block.text)
        if not knows_path(path)
    ]
    assert not faults, f"{page}: the API has no {'; no '.join(faults)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    settings = {f"GRIT_{name.upper()}" for name in Settings.model_fields}
    missing = sorted(
        name
        for name in set(_SETTING.findall(load(page)))
        if name not in settings
        and not (name.endswith("_") and any(each.startswith(name) for each in settings))
        and name not in _names()
    )
    assert not missing, f"{page}: there is no setting {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_backticks_is_one_of_the_code(page: str) -> None:
    missing = sorted({
        f"{word.place}: {name}"
        for word in load_words(page)
        if re.fullmatch(r"[\w.]+(\(\))?", word.text)
        for name in re.findall(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b", word.text)
        if name not in _names() and name not in _made_names() and not _is_secret(name)
    })
    assert not missing, f"the code has no {'; no '.join(missing)}"


def test_paths_are_compared_with_their_parameters() -> None:
    assert knows_path("/jobs/{id}/events", "GET")
    assert knows_path("/jobs/job_1", "DELETE")
    assert knows_path("/healthz", "HEAD")
    assert not knows_path("/jobs/{id}/eventz")
    assert not knows_path("/jobs/plan", "DELETE") or knows_path("/jobs/{job_id}", "DELETE")
    assert not knows_path("/datasets", "PUT")

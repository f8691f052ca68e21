"""Every link of README and docs/ leads somewhere."""

import re
from pathlib import PurePosixPath
from typing import Final
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import PAGES, ROOT, load, without_blocks

_LINK: Final = re.compile(
    r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]+(?:\([^()\s]*\))?)>?[^)]*\)"
)
_HOST: Final = re.compile(r"(?:[a-z0-9-]+\.)+[a-z]{2,}|localhost|127\.0\.0\.1|\d+(?:\.\d+){3}")


def links(page: str) -> list[str]:
    return _LINK.findall(without_blocks(load(page)))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.lower())
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := slug if number == 0 else f"{slug}-{number}") in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: str) -> None:
    broken = []
    for link in links(page):
        address = urlsplit(link)
        if address.scheme:
            continue
        target = (ROOT / page).parent / address.path if address.path else ROOT / page
        if not target.exists():
            broken.append(f"{link}: there is no such file")
        elif address.fragment and address.fragment not in anchors(target.read_text()):
            broken.append(f"{link}: there is no such heading")
    assert not broken, f"{page}: {'; '.join(broken)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_web_address_is_one(page: str) -> None:
    broken = []
    for address in re.findall(r"\bhttps?://[^\s\"'`)>\]|]*", load(page)):
        host = re.sub(r":[\d.]+$", "", urlsplit(address).netloc)
        is_pattern = set(host) & set("<>{$*.") and ("..." in host or "*" in host or "$" in host)
        if host and not _HOST.fullmatch(host) and not is_pattern:
            broken.append(address)
    assert not broken, f"{page}: {', '.join(broken)}"


def test_every_page_of_docs_is_named_by_readme() -> None:
    named = {str(PurePosixPath(link)) for link in links("README.md")}
    missing = [page for page in PAGES if page.startswith("docs/") and page not in named]
    assert not missing, f"README's table lacks {', '.join(missing)}"


def test_the_pages_have_links() -> None:
    assert sum(len(links(page)) for page in PAGES) > 40
    assert anchors("# A b\n## A `b` (c)\n# A b\n") == {"a-b", "a-b-c", "a-b-1"}

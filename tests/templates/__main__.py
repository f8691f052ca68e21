"""`make templates`: check labels and calls of tools under the templates of published models.

`python -m tests.templates [FOLDER ...]`: FOLDERs with more `.jinja` files. Prints what was refused
and why, and ends with status 1 when any label is wrong.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.templates.chats import CHATS
from tests.templates.check import Finding, check_chat
from tests.templates.sources import download_wheels, read_templates
from tests.templates.tokenizer import build_tokenizer
from tests.templates.tools import check_tools

_RIGHT = ("ok", "header")
_TOOLS_RIGHT = ("own", "fallback")


def main() -> int:
    """Check every template with every chat and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.templates", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    folders = parser.parse_args().folders
    templates = read_templates(download_wheels(Path("build/templates")), folders)
    counts: Counter[str] = Counter()
    tool_counts: Counter[str] = Counter()
    refused: defaultdict[str, set[str]] = defaultdict(set)
    wrong: list[str] = []
    for name, template in templates.items():
        for merges in (False, True):
            tokenizer = build_tokenizer(template, merges=merges)
            tools = _tried(check_tools, tokenizer)
            tool_counts[tools.kind] += 1
            if tools.kind not in _TOOLS_RIGHT:
                wrong.append(f"{name}, tools: {tools.kind}: {tools.detail[:300]}")
            for title, chat in CHATS.items():
                found = _tried(check_chat, tokenizer, chat)
                counts[found.kind] += 1
                if found.kind == "refused":
                    refused[name].add(f"{title}: {found.detail[:150]}")
                elif found.kind not in _RIGHT:
                    wrong.append(f"{name}, {title}: {found.kind}: {found.detail[:300]}")
    for name, reasons in refused.items():
        print(f"refused by {name}:", *sorted(reasons), sep="\n  ")
    print(*sorted(set(wrong)), sep="\n")
    print(f"{len(templates)} templates, {len(CHATS)} chats, two tokenizers: {dict(counts)}")
    print(f"tools: {dict(tool_counts)}")
    return 1 if wrong else 0


def _tried(check: Callable[..., Finding], *arguments: Any) -> Finding:
    try:
        return check(*arguments)
    except Exception as error:  # noqa: BLE001 - any is a fault of ours, and printed
        return Finding("raised", repr(error))


if __name__ == "__main__":
    sys.exit(main())

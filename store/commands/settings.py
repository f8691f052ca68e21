"""`python -m store settings`."""

from typing import Any

from store.configuration.page import render_page
from store.settings import Settings


def add_to(commands: Any) -> None:
    """Add the verb."""
    page = commands.add_parser("settings", help="print every setting as a page in Markdown")
    page.set_defaults(describe=lambda: render_page(Settings))

"""Python client and command line of the GRIT fine-tuning service.

`from grit_client import GritClient` is all most programs need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_client.client import GritClient as GritClient

__all__ = ["GritClient"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `grit --help` does not pay for an HTTP client.
    if name == "GritClient":
        from grit_client.client import GritClient  # noqa: PLC0415 - see above

        return GritClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The operator's command line on a database of each kind."""

from collections.abc import Callable

import pytest

from store.__main__ import main

Store = Callable[..., str]


@pytest.fixture
def store(
    database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Store:
    """Run a command and return what it prints; with `fails`, what it complains of."""
    monkeypatch.setenv("GRIT_DATABASE_URL", database_url)

    def run(*arguments: str, fails: bool = False) -> str:
        capsys.readouterr()
        assert main(arguments) == (1 if fails else 0)
        printed = capsys.readouterr()
        if fails:
            assert printed.out == ""
            assert len(printed.err.splitlines()) == 1
        return (printed.err if fails else printed.out).strip()

    return run

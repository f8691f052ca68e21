"""The database's clock as an SQL expression: leases never depend on a machine's own time."""

from typing import Any

from sqlalchemy import DateTime
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.expression import literal
from sqlalchemy.sql.functions import FunctionElement


class database_time(FunctionElement[Any]):  # noqa: N801 - reads as the SQL function that it is
    """The database's time at the start of the statement, moved by some seconds."""

    type = DateTime(timezone=True)
    inherit_cache = True
    name = "database_time"


def database_now() -> ColumnElement[Any]:
    """Return the database's time."""
    return database_time(literal(0.0))


def database_time_in(seconds: float) -> ColumnElement[Any]:
    """Return the database's time in so many seconds (in the past where negative)."""
    return database_time(literal(float(seconds)))


@compiles(database_time, "postgresql")
def _postgresql(element: database_time, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    return f"(statement_timestamp() + make_interval(secs => {seconds}))"


@compiles(database_time, "sqlite")
def _sqlite(element: database_time, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    # The very text that SQLAlchemy stores for a DateTime, so that texts compare as times.
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({seconds}) || ' seconds')"

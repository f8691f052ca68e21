"""Write `docs/families.md`."""

from tests.families import table

table.FILE.write_text(table.write(), encoding="utf-8")

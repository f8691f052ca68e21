"""Text families."""

from tests.families.case import FamilyCase

CASES: tuple[FamilyCase, ...] = ()

"""The second set of vision-language families."""

from tests.families.case import FamilyCase

CASES: tuple[FamilyCase, ...] = ()

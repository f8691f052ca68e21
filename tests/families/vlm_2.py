"""The second set of vision-language families."""

from tests.families import vlm_fixed, vlm_grid, vlm_newer, vlm_refused, vlm_tiled
from tests.families.case import FamilyCase

CASES: tuple[FamilyCase, ...] = (
    *vlm_fixed.CASES,
    *vlm_tiled.CASES,
    *vlm_grid.CASES,
    *vlm_newer.CASES,
    *vlm_refused.CASES,
)

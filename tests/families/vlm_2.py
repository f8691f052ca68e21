"""The second set of vision-language families."""

from tests.families import qianfan, vlm_fixed, vlm_grid, vlm_refused, vlm_tiled
from tests.families.case import FamilyCase

CASES: tuple[FamilyCase, ...] = (
    *vlm_fixed.CASES,
    *vlm_tiled.CASES,
    *vlm_grid.CASES,
    *qianfan.CASES,
    *vlm_refused.CASES,
)

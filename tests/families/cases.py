"""All families' cases."""

from tests.families import text, vlm_1, vlm_2

CASES = (*vlm_1.CASES, *vlm_2.CASES, *text.CASES)

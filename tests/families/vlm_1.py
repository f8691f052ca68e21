"""The first set of vision-language families."""

from tests.families import gemma_vl, internvl, llava, qwen_vl, smolvlm, vlm_grids

CASES = (
    *smolvlm.CASES,
    *llava.CASES,
    *qwen_vl.CASES,
    *internvl.CASES,
    *gemma_vl.CASES,
    *vlm_grids.CASES,
)

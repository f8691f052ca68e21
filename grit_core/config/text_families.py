"""The families of text models whose layer names are known."""

from grit_core.config.family import Family
from grit_core.config.model_configs import Modality

_TEXT = Modality.TEXT


def _causal(
    name: str,
    title: str,
    *model_types: str,
    blocks: str = "model.layers.*",
    queries: str = "self_attn.q_proj",
    values: str = "self_attn.v_proj",
    mixers: tuple[str, ...] = (),
    balanced_blocks: int = 8,
) -> Family:
    """Build a family of text models.

    Args:
        name: Of the family.
        title: For people.
        model_types: As in `config.json`.
        blocks: The pattern of the blocks.
        queries: Within a block, the layer that makes the attention's queries.
        values: Within a block, the layer that makes the attention's values; may be the same.
        mixers: Within a block, the input layers of what stands in place of attention or beside it.
        balanced_blocks: As in `Family`.
    """
    return Family(
        name=name,
        title=title,
        model_types=model_types,
        roots={blocks.partition(".")[0]: _TEXT, "lm_head": _TEXT},
        queries={_TEXT: f"{blocks}.{queries}"},
        values={_TEXT: f"{blocks}.{values}"},
        mixers=tuple(f"{blocks}.{mixer}" for mixer in mixers),
        balanced_blocks=balanced_blocks,
    )


def _fused(name: str, title: str, *model_types: str, blocks: str, layer: str) -> Family:
    """Build a family of text models whose queries, keys and values are made by one layer."""
    return _causal(name, title, *model_types, blocks=blocks, queries=layer, values=layer)


_MAMBA = ("mamba.in_proj",)

TEXT_FAMILIES = (
    _causal("llama", "Llama and SmolLM (text)", "llama", "smollm3"),
    _causal(
        "mistral",
        "Mistral, Ministral and Mixtral (text)",
        *("mistral", "ministral", "ministral3", "mixtral"),
    ),
    _causal("qwen2", "Qwen2, Qwen2.5 and their MoE (text)", "qwen2", "qwen2_moe"),
    _causal("qwen3", "Qwen3 and its MoE (text)", "qwen3", "qwen3_moe"),
    _causal(
        "qwen3_next",
        "Qwen3-Next (text)",
        "qwen3_next",
        mixers=("linear_attn.in_proj_qkvz",),
    ),
    _causal(
        "qwen3_5_text",
        "Qwen3.5 (text)",
        *("qwen3_5_text", "qwen3_5_moe_text"),
        mixers=("linear_attn.in_proj_qkv",),
    ),
    _causal("gemma", "Gemma (text)", "gemma", "gemma2", "gemma3_text", "gemma4_text"),
    _causal("phi", "Phi-1.5, Phi-2 and Phi-3.5-MoE (text)", "phi", "phimoe"),
    _fused(
        "phi3",
        "Phi-3 and Phi-4 (text)",
        "phi3",
        blocks="model.layers.*",
        layer="self_attn.qkv_proj",
    ),
    _causal("olmo", "OLMo, OLMo 2, OLMo 3 and OLMoE (text)", "olmo", "olmo2", "olmo3", "olmoe"),
    _causal("cohere", "Command R and Command R7B (text)", "cohere", "cohere2"),
    _causal(
        "granite",
        "Granite and its MoE (text)",
        *("granite", "granitemoe", "granitemoeshared"),
    ),
    _causal("granite_hybrid", "Granite 4 hybrid (text)", "granitemoehybrid", mixers=_MAMBA),
    _causal("glm", "GLM-4 and GLM-4.5 (text)", "glm", "glm4", "glm4_moe"),
    _causal("gpt_oss", "gpt-oss (text)", "gpt_oss"),
    # Multi-head latent attention; smaller members make the queries in one layer, q_proj.
    _causal(
        "deepseek",
        "DeepSeek-V2, V3 and R1 (text)",
        *("deepseek_v2", "deepseek_v3"),
        queries="self_attn.q_*proj",
        values="self_attn.kv_b_proj",
        balanced_blocks=6,
    ),
    _causal("starcoder2", "StarCoder2 (text)", "starcoder2"),
    _causal("stablelm", "StableLM (text)", "stablelm"),
    _causal("nemotron", "Nemotron and Minitron (text)", "nemotron"),
    _causal("exaone4", "EXAONE 4 (text)", "exaone4"),
    _causal("ernie4_5", "ERNIE 4.5 and its MoE (text)", "ernie4_5", "ernie4_5_moe"),
    _causal("hunyuan", "Hunyuan and its MoE (text)", "hunyuan_v1_dense", "hunyuan_v1_moe"),
    _causal("opt", "OPT (text)", "opt", blocks="model.decoder.layers.*"),
    _fused(
        "falcon",
        "Falcon (text)",
        "falcon",
        blocks="transformer.h.*",
        layer="self_attention.query_key_value",
    ),
    _fused(
        "bloom",
        "BLOOM (text)",
        "bloom",
        blocks="transformer.h.*",
        layer="self_attention.query_key_value",
    ),
    _fused(
        "gpt_neox",
        "GPT-NeoX and Pythia (text)",
        "gpt_neox",
        blocks="gpt_neox.layers.*",
        layer="attention.query_key_value",
    ),
    _causal("lfm2", "LFM2 and its MoE (text)", "lfm2", "lfm2_moe", mixers=("conv.in_proj",)),
    _causal("jamba", "Jamba and Bamba (text)", "jamba", "bamba", mixers=_MAMBA),
    _causal("falcon_h1", "Falcon-H1 (text)", "falcon_h1", mixers=_MAMBA, balanced_blocks=6),
    _fused(
        "mamba",
        "Mamba, Mamba 2 and Falcon-Mamba (text)",
        *("mamba", "mamba2", "falcon_mamba"),
        blocks="backbone.layers.*",
        layer="mixer.in_proj",
    ),
)

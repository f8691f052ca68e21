"""The families of vision-language models whose submodule names are known."""

from dataclasses import replace

from grit_core.config.family import Family
from grit_core.config.model_configs import Modality

_VISION, _TEXT, _CROSS = Modality.VISION, Modality.TEXT, Modality.CROSS_MODAL


def _vlm(
    name: str,
    title: str,
    *model_types: str,
    vision: tuple[str, str, str],
    text: str = "model.language_model",
    connectors: tuple[str, ...] = ("model.multi_modal_projector",),
    cross: tuple[str, ...] = (),
    mixers: tuple[str, ...] = (),
) -> Family:
    """Build a family of a vision model, a connector and a language model.

    Args:
        name: Of the family.
        title: For people.
        model_types: As in `config.json`.
        vision: The vision model's name, and its patterns for queries and values.
        text: The language model's name.
        connectors: Names of the submodules between the two.
        cross: Patterns for the connector's layers; none when it has no linear layer.
        mixers: Patterns of what stands in place of attention in some of the text blocks.
    """
    attention = f"{text}.layers.*.self_attn"
    roots = {vision[0]: _VISION, text: _TEXT, "lm_head": _TEXT}
    roots |= dict.fromkeys(connectors, _CROSS)
    queries = {_VISION: vision[1], _TEXT: f"{attention}.q_proj"}
    values = {_VISION: vision[2], _TEXT: f"{attention}.v_proj"}
    if cross:
        queries[_CROSS], values[_CROSS] = cross[0], cross[-1]
    return Family(
        name=name,
        title=title,
        model_types=model_types,
        roots=roots,
        queries=queries,
        values=values,
        mixers=mixers,
    )


def _with_towers(family: Family, *names: str) -> Family:
    """Add submodules for images that adapt by explicit patterns only."""
    return replace(family, roots={**family.roots, **dict.fromkeys(names, _VISION)})


def _with_latent_attention(family: Family, text: str = "model.language_model") -> Family:
    """Let the text patterns fit q_a_proj, q_b_proj and kv_b_proj too, where there are such."""
    attention = f"{text}.layers.*.self_attn"
    return replace(
        family,
        queries={**family.queries, _TEXT: f"{attention}.q_*proj"},
        values={**family.values, _TEXT: f"{attention}.*v_*proj"},
    )


def _siglip(root: str) -> tuple[str, str, str]:
    attention = f"{root}.encoder.layers.*.self_attn"
    return root, f"{attention}.q_proj", f"{attention}.v_proj"


def _any_tower(root: str) -> tuple[str, str, str]:
    """Return patterns for towers of several kinds: CLIP's, SigLIP's and Pixtral's names differ."""
    attention = f"{root}.*.layers.*.*att*"
    return root, f"{attention}.q_proj", f"{attention}.v_proj"


def _qwen_visual() -> tuple[str, str, str]:
    fused = "model.visual.blocks.*.attn.qkv"
    return "model.visual", fused, fused


_MLLAMA = Family(
    name="mllama",
    title="Llama 3.2 Vision",
    model_types=("mllama",),
    roots={
        "model.vision_model": _VISION,
        "model.language_model": _TEXT,
        "model.multi_modal_projector": _CROSS,
        "lm_head": _TEXT,
    },
    queries={
        _VISION: "model.vision_model.transformer.layers.*.self_attn.q_proj",
        _TEXT: "model.language_model.layers.*.self_attn.q_proj",
        _CROSS: "model.multi_modal_projector",
        Modality.FUSION: "model.language_model.layers.*.cross_attn.q_proj",
    },
    values={
        _VISION: "model.vision_model.transformer.layers.*.self_attn.v_proj",
        _TEXT: "model.language_model.layers.*.self_attn.v_proj",
        _CROSS: "model.multi_modal_projector",
        Modality.FUSION: "model.language_model.layers.*.cross_attn.v_proj",
    },
    fusion_part="cross_attn",
)

_LLAMA4 = Family(
    name="llama4",
    title="Llama 4",
    model_types=("llama4",),
    roots={
        "vision_model": _VISION,
        "vision_model.vision_adapter": _CROSS,
        "multi_modal_projector": _CROSS,
        "language_model": _TEXT,
    },
    queries={
        _VISION: "vision_model.model.layers.*.self_attn.q_proj",
        _TEXT: "language_model.model.layers.*.self_attn.q_proj",
        _CROSS: "vision_model.vision_adapter.mlp.*",
    },
    values={
        _VISION: "vision_model.model.layers.*.self_attn.v_proj",
        _TEXT: "language_model.model.layers.*.self_attn.v_proj",
        _CROSS: "multi_modal_projector.linear_1",
    },
)

_PROJECTOR = ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")

VLM_FAMILIES = (
    _vlm(
        "smolvlm",
        "SmolVLM, SmolVLM2 and Idefics3",
        "idefics3",
        "smolvlm",
        vision=_siglip("model.vision_model"),
        text="model.text_model",
        connectors=("model.connector",),
        cross=("model.connector.modality_projection.proj",),
    ),
    _vlm(
        "llava",
        "LLaVA 1.5, LLaVA-NeXT, VipLLaVA and Pixtral",
        "llava",
        "llava_next",
        "vipllava",
        vision=_any_tower("model.vision_tower"),
        cross=_PROJECTOR,
    ),
    _vlm(
        "llava_onevision",
        "LLaVA-OneVision",
        "llava_onevision",
        vision=_siglip("model.vision_tower"),
        cross=_PROJECTOR,
    ),
    _vlm(
        "qwen2_5_vl",
        "Qwen2-VL and Qwen2.5-VL",
        "qwen2_vl",
        "qwen2_5_vl",
        vision=_qwen_visual(),
        connectors=("model.visual.merger",),
        cross=("model.visual.merger.mlp.*",),
    ),
    _vlm(
        "qwen3_vl",
        "Qwen3-VL",
        "qwen3_vl",
        "qwen3_vl_moe",
        vision=_qwen_visual(),
        connectors=("model.visual.merger", "model.visual.deepstack_merger_list"),
        cross=("model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"),
    ),
    _vlm(
        "qwen3_5",
        "Qwen3.5",
        "qwen3_5",
        "qwen3_5_moe",
        vision=_qwen_visual(),
        connectors=("model.visual.merger",),
        cross=("model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"),
        mixers=("model.language_model.layers.*.linear_attn.in_proj_qkv",),
    ),
    # Gemma 3 connects by a bare parameter, which is no linear layer.
    _vlm("gemma3", "Gemma 3", "gemma3", vision=_siglip("model.vision_tower")),
    _vlm(
        "gemma4",
        "Gemma 4",
        "gemma4",
        vision=(
            "model.vision_tower",
            "model.vision_tower.encoder.layers.*.self_attn.q_proj.linear",
            "model.vision_tower.encoder.layers.*.self_attn.v_proj.linear",
        ),
        connectors=("model.embed_vision",),
        cross=("model.embed_vision.embedding_projection",),
    ),
    _vlm(
        "exaone4_5",
        "EXAONE 4.5",
        "exaone4_5",
        vision=_qwen_visual(),
        connectors=("model.visual.merger",),
        cross=("model.visual.merger.mlp.*",),
    ),
    _vlm(
        "video_llama_3",
        "VideoLLaMA 3 (images)",
        "video_llama_3",
        vision=_siglip("model.vision_model"),
        connectors=("model.projector",),
        cross=("model.projector.readout.*",),
    ),
    _vlm(
        "llava_next_video",
        "LLaVA-NeXT-Video (images)",
        "llava_next_video",
        vision=_siglip("model.vision_tower"),
        cross=_PROJECTOR,
    ),
    _vlm(
        "internvl",
        "InternVL (Hugging Face)",
        "internvl",
        vision=(
            "model.vision_tower",
            "model.vision_tower.encoder.layer.*.attention.q_proj",
            "model.vision_tower.encoder.layer.*.attention.v_proj",
        ),
        cross=_PROJECTOR,
    ),
    _vlm(
        "paligemma",
        "PaliGemma",
        "paligemma",
        vision=_siglip("model.vision_tower"),
        cross=("model.multi_modal_projector.linear",),
    ),
    _MLLAMA,
    _LLAMA4,
    _vlm(
        "idefics2",
        "Idefics2",
        "idefics2",
        vision=_siglip("model.vision_model"),
        text="model.text_model",
        connectors=("model.connector",),
        cross=(
            "model.connector.perceiver_resampler.layers.*.self_attn.q_proj",
            "model.connector.perceiver_resampler.layers.*.self_attn.v_proj",
        ),
    ),
    # Mistral Small 4 has the model type of Mistral Small 3, and another attention.
    _with_latent_attention(
        _vlm(
            "mistral3",
            "Mistral Small 3.1 and later (vision)",
            "mistral3",
            vision=_any_tower("model.vision_tower"),
            cross=_PROJECTOR,
        )
    ),
    _vlm(
        "cohere_vision",
        "Aya Vision and Command A Vision",
        "aya_vision",
        "cohere2_vision",
        vision=_siglip("model.vision_tower"),
        cross=_PROJECTOR,
    ),
    _vlm(
        "glm4v",
        "GLM-4.1V, GLM-4.5V and GLM-4.6V",
        "glm4v",
        "glm4v_moe",
        "glm46v",
        vision=_qwen_visual(),
        connectors=("model.visual.merger",),
        # PEFT takes the names of the merger's other layers for those of experts.
        cross=("model.visual.merger.proj",),
    ),
    _vlm(
        "ovis2",
        "Ovis2",
        "ovis2",
        vision=(
            "model.vision_tower",
            "model.vision_tower.transformer.encoder.layers.*.attention.q_proj",
            "model.vision_tower.transformer.encoder.layers.*.attention.v_proj",
        ),
        connectors=("model.vision_tower.head_linear",),
        cross=("model.vision_tower.head_linear",),
    ),
    _with_towers(
        _vlm(
            "deepseek_vl",
            "DeepSeek-VL",
            "deepseek_vl",
            "deepseek_vl_hybrid",
            vision=_siglip("model.vision_model"),
            connectors=("model.aligner",),
            cross=("model.aligner.*",),
        ),
        "model.high_res_vision_model",
    ),
    # The towers that draw images have no part in an answer in words.
    _with_towers(
        _vlm(
            "janus",
            "Janus (answers in words only)",
            "janus",
            vision=_siglip("model.vision_model"),
            connectors=("model.aligner",),
            cross=("model.aligner.fc1", "model.aligner.hidden_layers.*"),
        ),
        "model.vqmodel",
        "model.generation_aligner",
        "model.generation_head",
    ),
    _vlm(
        "aria",
        "Aria",
        "aria",
        vision=_siglip("model.vision_tower"),
        cross=(
            "model.multi_modal_projector.cross_attn.q_proj",
            "model.multi_modal_projector.cross_attn.v_proj",
        ),
    ),
    _vlm(
        "lighton_ocr",
        "LightOnOCR",
        "lighton_ocr",
        vision=_any_tower("model.vision_encoder"),
        connectors=("model.vision_projection",),
        cross=("model.vision_projection.linear_1", "model.vision_projection.linear_2"),
    ),
    _vlm(
        "paddleocr_vl",
        "PaddleOCR-VL",
        "paddleocr_vl",
        vision=(
            "model.visual",
            "model.visual.vision_model.encoder.layers.*.self_attn.q_proj",
            "model.visual.vision_model.encoder.layers.*.self_attn.v_proj",
        ),
        connectors=("model.projector",),
        cross=("model.projector.linear_1", "model.projector.linear_2"),
    ),
    _vlm(
        "qianfan_ocr",
        "Qianfan-OCR",
        "qianfan_ocr",
        vision=(
            "model.vision_tower",
            "model.vision_tower.layers.*.attention.q_proj",
            "model.vision_tower.layers.*.attention.v_proj",
        ),
        cross=_PROJECTOR,
    ),
    _vlm(
        "lfm2_vl",
        "LFM2-VL",
        "lfm2_vl",
        vision=_siglip("model.vision_tower"),
        cross=_PROJECTOR,
        mixers=("model.language_model.layers.*.conv.in_proj",),
    ),
)

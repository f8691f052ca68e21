"""Text families: dense, sliding-window, mixture-of-experts, hybrid and state-space ones."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import text_styles as styles
from tests.families.case import FamilyCase
from tests.families.text_styles import Style
from tests.families.tokenizers import token_ids
from tests.families.weights import save_random

WINDOW_TOKENS = 8
"""Shorter than every chat, so that a window matters."""

SEED = 2
"""Of the weights; one with which every model's answers vary."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
HEADS: dict[str, Any] = {"head_dim": 16}
WINDOW: dict[str, Any] = {"sliding_window": WINDOW_TOKENS}
ALTERNATING: dict[str, Any] = {
    **WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
"""For types whose embeddings would outweigh their blocks however they are scaled."""
STATE_SPACE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    **UNTIED,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048}


TIED_SCALE = 0.05
"""Of tied embeddings, before the scale that makes a head's logits differ."""


def _build_decisive(config: Any) -> nn.Module:
    """Build a model whose blocks outweigh the token embeddings, as a trained one's do.

    Transformers starts matrices near zero: attention is uniform, experts are alike, and a model
    with tied embeddings repeats its last token whatever an adapter or a mask does.
    """
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(embedding.weight), id(head.weight)}
    with torch.no_grad():
        if head.weight is embedding.weight:
            embedding.weight.mul_(TIED_SCALE)
        for parameter in model.parameters():
            if parameter.dim() >= 2 and id(parameter) not in ends and 0 < parameter.std() < 0.05:
                parameter.mul_(parameter.shape[-1] ** -0.5 / parameter.std())
    return model


def text_case(
    model_type: str,
    style: Style,
    *traits: str,
    variant: str = "",
    refused: str | None = None,
    needs: str = "",
    **config: Any,
) -> FamilyCase:
    """Describe a text model by what its config has beside the common sizes."""

    def build(folder: Path) -> None:
        tokenizer = style.tokenizer()
        sizes = {} if model_type in OWN_SIZES else SIZES
        values = {**sizes, "vocab_size": len(tokenizer), **token_ids(tokenizer), **config}
        save_random(
            _build_decisive,
            AutoConfig.for_model(model_type, **values),
            folder,
            tokenizer=tokenizer,
            seed=SEED,
        )
        tokenizer.save_pretrained(folder)

    return FamilyCase(
        model_type=model_type,
        reads_images=False,
        build=build,
        end=style.end,
        takes_system=style.takes_system,
        traits=frozenset(traits),
        variant=variant,
        refused=refused,
        needs=needs,
    )


OWN_SIZES = frozenset({
    *("gpt2", "gpt_bigcode", "gpt_neo", "bloom", "dbrx", "mamba", "mamba2", "falcon_mamba"),
})
"""Types whose config has other names for its sizes."""

DENSE = (
    text_case("llama", styles.LLAMA3),
    text_case("mistral", styles.MISTRAL),
    text_case("ministral3", styles.MISTRAL),
    text_case("qwen2", styles.QWEN2),
    text_case("qwen3", styles.QWEN3, **HEADS),
    text_case("smollm3", styles.QWEN3),
    text_case("gemma", styles.GEMMA, **HEADS),
    text_case("phi", styles.BASE),
    text_case("phi3", styles.PHI3),
    text_case("olmo2", styles.OLMO),
    text_case("cohere", styles.COHERE),
    text_case("granite", styles.GRANITE),
    text_case("glm4", styles.GLM4, **HEADS),
    text_case("stablelm", styles.CHATML),
    text_case("nemotron", styles.CHATML),
    text_case("ernie4_5", styles.ERNIE, **HEADS),
    text_case("hunyuan_v1_dense", styles.HUNYUAN, **HEADS),
    text_case("falcon", styles.BASE),
    text_case("gpt_neox", styles.BASE),
    text_case("bloom", styles.BLOOM, hidden_size=32, n_layer=2, n_head=2, **UNTIED),
    text_case("opt", styles.OPT, ffn_dim=48, word_embed_proj_dim=32),
    text_case("gpt_bigcode", styles.BASE, **GPT2),
)

SLIDING = (
    text_case("mistral", styles.MISTRAL, "sliding_window", variant="sliding", **WINDOW),
    text_case(
        "qwen2",
        styles.QWEN2,
        "sliding_window",
        variant="sliding",
        use_sliding_window=True,
        max_window_layers=1,
        **WINDOW,
    ),
    text_case(
        "gemma2", styles.GEMMA, "sliding_window", query_pre_attn_scalar=16, **ALTERNATING, **HEADS
    ),
    text_case(
        "gemma3_text",
        styles.GEMMA,
        "sliding_window",
        query_pre_attn_scalar=16,
        **ALTERNATING,
        **HEADS,
    ),
    text_case("phi3", styles.PHI3, "sliding_window", variant="sliding", **WINDOW),
    text_case("olmo3", styles.OLMO, "sliding_window", **ALTERNATING),
    text_case("cohere2", styles.COHERE, "sliding_window", **ALTERNATING, **HEADS),
    text_case("starcoder2", styles.BASE, "sliding_window", **WINDOW),
    text_case(
        "gpt_neo",
        styles.BASE,
        "sliding_window",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW_TOKENS,
        max_position_embeddings=2048,
    ),
    # Later blocks read the keys and values of earlier ones.
    text_case(
        "gemma4_text",
        styles.GEMMA,
        "sliding_window",
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=262,
        **{
            **ALTERNATING,
            **HEADS,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    text_case("exaone4", styles.EXAONE, "sliding_window", **ALTERNATING),
)

MIXTURES = (
    text_case("mixtral", styles.MISTRAL, "moe", **LOCAL_EXPERTS),
    text_case(
        "qwen2_moe",
        styles.QWEN2,
        "moe",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **EXPERTS,
    ),
    text_case("qwen3_moe", styles.QWEN3, "moe", moe_intermediate_size=16, **EXPERTS, **HEADS),
    text_case("phimoe", styles.PHI3, "moe", **LOCAL_EXPERTS),
    text_case("olmoe", styles.OLMO, "moe", **EXPERTS),
    text_case("granitemoe", styles.GRANITE, "moe", **LOCAL_EXPERTS),
    text_case("glm4_moe", styles.GLM4, "moe", **ROUTED_EXPERTS, **HEADS),
    text_case(
        "gpt_oss", styles.HARMONY, "moe", "sliding_window", **LOCAL_EXPERTS, **ALTERNATING, **HEADS
    ),
    text_case(
        "deepseek_v2",
        styles.DEEPSEEK,
        "moe",
        "latent_attention",
        q_lora_rank=None,
        **{**ROUTED_EXPERTS, **LATENT},
    ),
    text_case(
        "deepseek_v3",
        styles.DEEPSEEK,
        "moe",
        "latent_attention",
        q_lora_rank=8,
        **{**ROUTED_EXPERTS, **LATENT},
    ),
    # An indexer of its own chooses the tokens that an answer attends to, fewer than there are.
    text_case(
        "deepseek_v32",
        styles.DEEPSEEK,
        *("moe", "latent_attention", "sparse_attention"),
        q_lora_rank=8,
        index_head_dim=8,
        index_n_heads=32,
        index_topk=WINDOW_TOKENS,
        **{**ROUTED_EXPERTS, **LATENT},
    ),
    text_case(
        "ernie4_5_moe",
        styles.ERNIE,
        "moe",
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        **HEADS,
    ),
    text_case(
        "dbrx",
        styles.CHATML,
        "moe",
        d_model=32,
        n_heads=2,
        n_layers=2,
        max_seq_len=2048,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    text_case(
        "llama4_text",
        styles.LLAMA3,
        *("moe", "sliding_window"),
        attention_chunk_size=WINDOW_TOKENS,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
        **{**LOCAL_EXPERTS, **HEADS, "num_experts_per_tok": 1},
    ),
    text_case("hunyuan_v1_moe", styles.HUNYUAN, "moe", num_experts=4, moe_topk=2, **HEADS),
)

STATES = (
    text_case("mamba", styles.BASE, "ssm", **STATE_SPACE),
    text_case(
        "mamba2",
        styles.BASE,
        "ssm",
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
        **STATE_SPACE,
    ),
    text_case("falcon_mamba", styles.CHATML, "ssm", **STATE_SPACE),
    text_case(
        "jamba",
        styles.JAMBA,
        *("hybrid", "ssm", "moe"),
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        **EXPERTS,
    ),
    text_case("bamba", styles.BASE, "hybrid", "ssm", attn_layer_indices=[1], **MAMBA),
    text_case("falcon_h1", styles.CHATML, "hybrid", "ssm", mamba_d_ssm=64, **MAMBA, **HEADS),
    text_case(
        "granitemoehybrid",
        styles.GRANITE,
        *("hybrid", "ssm", "moe"),
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
        **LOCAL_EXPERTS,
        **MAMBA,
    ),
    text_case(
        "recurrent_gemma",
        styles.GEMMA,
        *("hybrid", "sliding_window"),
        lru_width=32,
        attention_window_size=WINDOW_TOKENS,
        **{**HEADS, "num_hidden_layers": 3},
    ),
    text_case("lfm2", styles.LFM2, "hybrid", full_attn_idxs=[1]),
    text_case(
        "lfm2_moe",
        styles.LFM2,
        *("hybrid", "moe"),
        moe_intermediate_size=16,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
        **EXPERTS,
    ),
    text_case(
        "nemotron_h",
        styles.CHATML,
        *("hybrid", "ssm", "moe"),
        layers_block_type=["mamba", "moe", "full_attention"],
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        n_routed_experts=4,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
        **{**HEADS, "num_hidden_layers": 3},
    ),
    text_case(
        "qwen3_next",
        styles.QWEN3,
        *("hybrid", "moe"),
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **EXPERTS,
        **DELTA_NET,
        **HEADS,
    ),
    text_case("qwen3_5_text", styles.QWEN3, "hybrid", **DELTA_NET, **HEADS),
)

REFUSED = (
    text_case(
        "gpt2",
        styles.BASE,
        refused="8 Conv1D; LoRA is put on nn.Linear layers only",
        needs="its weights are in `Conv1D`, and LoRA is put on `nn.Linear` only",
        **GPT2,
    ),
    text_case(
        "llama",
        styles.LLAMA3,
        variant="quantised",
        refused="quantised \\(fp8.*save it with save_pretrained",
        needs="a config with `quantization_config`: only unquantised weights are trained",
        quantization_config={"quant_method": "fp8"},
    ),
)

CASES: tuple[FamilyCase, ...] = (*DENSE, *SLIDING, *MIXTURES, *STATES, *REFUSED)

"""Chat templates in the style of many families, and what each does to an answer, written by hand.

The templates are our own words in the structure of a family's; `templates/` holds them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Processor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from grit_core.data.chat_template import plain_template
from tests.grit_core.data.tokenizers import byte_level, metaspace, wrap
from tests.tiny_models import SMOLVLM_TEMPLATE


class _ImagesOnly(LlavaOnevisionProcessor):
    """Without a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument is not None:
            super().check_argument_for_proper_class(argument_name, argument)


FOLDER = Path(__file__).parent / "templates"


def as_is(text: str) -> str:
    return text


def without_first_breaks(text: str) -> str:
    return text.lstrip("\n")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One template with its tokenizer's facts and what it does to an answer."""

    name: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    adds_bos: bool = False
    end: str
    """After the last answer."""
    history_end: str | None = None
    """After an earlier answer that shares its text; the same when not given."""
    blank: str = ""
    """What the template writes between prompt and answer, and the model has to write."""
    unlabelled: str = ""
    """What the template writes there, and the model need not write."""
    dropped: str = ""
    """An empty thought that only a finished last turn has."""
    trims: Callable[[str], str] = as_is
    refuses: frozenset[str] = frozenset()
    """`system`, `opening`: chats that the template refuses."""
    image_token: str | None = None
    kind: str = "llava"
    text_roles: frozenset[str] = frozenset()
    """Roles of a VLM's template whose content is a text."""

    @property
    def template(self) -> str | None:
        if self.name.startswith("plain"):
            return None
        if self.name == "smolvlm":
            return SMOLVLM_TEMPLATE
        return (FOLDER / f"{self.name}.jinja").read_text()


def family(name: str, specials: str, **facts: Any) -> Family:
    return Family(name=name, specials=tuple(specials.split()), **facts)


OPENING = frozenset({"opening"})
IM = "<|im_start|> <|im_end|> <|endoftext|>"
LLAMA3 = "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"
COHERE = (
    "<BOS> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>"
    " <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|>"
)
PHI3 = "<s> <|system|> <|user|> <|assistant|> <|end|> <|endoftext|>"
MISTRAL = "<s> </s> [INST] [/INST] [IMG]"
IM_END = {"eos": "<|im_end|>", "end": "<|im_end|>"}
EOT = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "end": "<|eot_id|>"}
S = {"bos": "<s>", "eos": "</s>", "end": "</s>"}
GEMMA = {"bos": "<bos>", "eos": "<eos>", "end": "<end_of_turn>", "trims": str.strip}
TURN = "<|END_OF_TURN_TOKEN|>"
TEXT = "<|endoftext|>"

FAMILIES = (
    family("qwen2", IM, **IM_END),
    family("yi", IM, **IM_END),
    family(
        "qwen3",
        IM,
        **IM_END,
        dropped="<think>\n\n</think>\n\n",
        trims=without_first_breaks,
    ),
    family(
        "qwen3_thinking",
        IM,
        **IM_END,
        unlabelled="\n</think>\n\n",
        trims=without_first_breaks,
    ),
    family("llama3", LLAMA3, **EOT, trims=str.strip),
    family("llama31", LLAMA3, **EOT, adds_bos=True, trims=str.strip),
    family("llama3_unasked", LLAMA3, **EOT, trims=str.strip),
    family(
        "llama2",
        "<s> </s>",
        **{**S, "end": " </s>"},
        adds_bos=True,
        blank=" ",
        trims=str.strip,
        refuses=OPENING,
    ),
    family("mistral_v1", "<s> </s>", **S, adds_bos=True, refuses=OPENING | {"system"}),
    family("mistral_v3", MISTRAL, **S, adds_bos=True, blank=" ", refuses=OPENING),
    family("mistral_nemo", MISTRAL, **S, adds_bos=True, refuses=OPENING),
    family(
        "pixtral",
        MISTRAL,
        **S,
        refuses=OPENING,
        image_token="[IMG]",
        text_roles=frozenset({"system", "assistant"}),
    ),
    family(
        "gemma",
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        **GEMMA,
        adds_bos=True,
        refuses=OPENING | {"system"},
    ),
    family(
        "gemma3",
        "<bos> <eos> <start_of_turn> <end_of_turn> <start_of_image>",
        **GEMMA,
        adds_bos=True,
        refuses=OPENING,
        image_token="<start_of_image>",
    ),
    family(
        "phi3",
        PHI3,
        bos="<s>",
        eos=TEXT,
        adds_bos=True,
        end=f"<|end|>\n{TEXT}",
        history_end="<|end|>",
    ),
    family("phi4", f"{IM} <|im_sep|>", bos=TEXT, **IM_END),
    family("phi4_mini", PHI3, bos=TEXT, eos=TEXT, end=f"<|end|>{TEXT}"),
    family("command_r", COHERE, bos="<BOS>", eos=TURN, end=TURN, trims=str.strip),
    family(
        "command_r7b",
        COHERE,
        bos="<BOS>",
        eos=TURN,
        end=f"<|END_RESPONSE|>{TURN}",
        unlabelled="<|START_RESPONSE|>",
    ),
    family(
        "aya_vision",
        f"{COHERE} <image>",
        bos="<BOS>",
        eos=TURN,
        end=f"<|END_RESPONSE|>{TURN}",
        image_token="<image>",
    ),
    family(
        "harmony",
        "<|start|> <|end|> <|message|> <|channel|> <|return|>",
        eos="<|return|>",
        end="<|return|>",
        unlabelled="<|channel|>final<|message|>",
    ),
    family("deepseek_v2", "<bos> <eos>", bos="<bos>", eos="<eos>", end="<eos>", blank=" "),
    family(
        "deepseek_r1",
        "<bos> <|end_of_sentence|> <|User|> <|Assistant|>",
        bos="<bos>",
        eos="<|end_of_sentence|>",
        end="<|end_of_sentence|>",
    ),
    family(
        "glm4",
        f"[gMASK] <sop> <|system|> <|user|> <|assistant|> {TEXT}",
        eos=TEXT,
        end=TEXT,
        blank="\n",
    ),
    family(
        "granite",
        "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
    ),
    family("olmo2", TEXT, bos=TEXT, eos=TEXT, end=TEXT),
    family("falcon", TEXT, eos=TEXT, end=TEXT, blank=" ", trims=str.strip),
    family("zephyr", "<s> </s>", **S, adds_bos=True),
    family(
        "starchat",
        f"<|system|> <|user|> <|assistant|> <|end|> {TEXT}",
        eos=TEXT,
        end="<|end|>",
        blank="\n",
    ),
    family("stablelm2", f"<|user|> <|assistant|> {TEXT}", eos=TEXT, end=TEXT),
    family("vicuna", "<s> </s>", **S, adds_bos=True, blank=" ", trims=str.strip),
    family("llava", "<s> </s> <image>", **S, adds_bos=True, blank=" ", image_token="<image>"),
    family(
        "llava_onevision",
        f"{IM} <image> <video>",
        **IM_END,
        image_token="<image>",
        kind="llava_onevision",
    ),
    family(
        "smolvlm",
        "<|im_start|> <end_of_utterance> <fake_token_around_image> <image> <global-img>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        end="<end_of_utterance>",
        blank=" ",
        image_token="<image>",
        kind="idefics3",
    ),
    family("smollm3", IM, **IM_END, trims=without_first_breaks),
    family("internvl", f"{IM} <IMG_CONTEXT>", **IM_END, image_token="<IMG_CONTEXT>"),
    family(
        "qwen2_vl",
        f"{IM} <|vision_start|> <|image_pad|> <|vision_end|>",
        **IM_END,
        image_token="<|image_pad|>",
    ),
    family(
        "llama32_vision", f"{LLAMA3} <|image|>", **EOT, trims=str.strip, image_token="<|image|>"
    ),
    family(
        "paligemma_chat",
        "<bos> <eos> <image>",
        bos="<bos>",
        eos="<eos>",
        end="<eos>",
        image_token="<image>",
    ),
    family(
        "phi35_vision",
        f"{PHI3} <image>",
        bos="<s>",
        eos=TEXT,
        adds_bos=True,
        end=f"<|end|>\n{TEXT}",
        history_end="<|end|>",
        image_token="<image>",
    ),
    family(
        "llava_text",
        "<s> </s> <image>",
        **S,
        adds_bos=True,
        blank=" ",
        image_token="<image>",
        text_roles=frozenset({"system", "user", "assistant"}),
    ),
    family("minicpm", "<s> </s> <用户> <AI>", **S, adds_bos=True, trims=str.strip),
    family(
        "exaone",
        "[|system|] [|user|] [|assistant|] [|endofturn|]",
        eos="[|endofturn|]",
        end="[|endofturn|]",
    ),
    family("nemotron", "<extra_id_0> <extra_id_1> </s>", eos="</s>", end="</s>", trims=str.strip),
    family(
        "openchat",
        "<s> <|end_of_turn|>",
        bos="<s>",
        eos="<|end_of_turn|>",
        end="<|end_of_turn|>",
        blank=" ",
    ),
    family("solar", "<s> </s>", **S, adds_bos=True),
    family(
        "internlm2", "<s> </s> <|im_start|> <|im_end|>", **{**S, "end": "<|im_end|>"}, adds_bos=True
    ),
    family("baichuan2", "<s> </s> <reserved_106> <reserved_107>", **S),
    family("plain", "<s> </s>", **S, adds_bos=True, blank=" "),
    family("plain_vlm", "<s> </s> <image>", **S, adds_bos=True, blank=" ", image_token="<image>"),
)
BY_NAME = {each.name: each for each in FAMILIES}


@cache
def processor(name: str, tokens: str = "bytes") -> Any:
    """The family's processor (or tokenizer) on a tokenizer of one kind."""
    one = BY_NAME[name]
    base = {
        "bytes": lambda: byte_level(one.specials),
        "merges": lambda: byte_level(one.specials, merges=True),
        "pieces": lambda: metaspace(one.specials, prepend="first"),
        "legacy pieces": lambda: metaspace(one.specials, prepend="always"),
    }[tokens]()
    tokenizer = wrap(base, bos=one.bos, eos=one.eos, adds_bos=one.adds_bos)
    made = _with_images(one, tokenizer) if one.image_token else tokenizer
    made.chat_template = one.template or plain_template(made)
    return made


def _with_images(one: Family, tokenizer: PreTrainedTokenizerFast) -> Any:
    if one.kind == "idefics3":
        image_processor = Idefics3ImageProcessorPil(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
        )
        return Idefics3Processor(image_processor, tokenizer, image_seq_len=4)
    if one.kind == "llava_onevision":
        image_processor = LlavaOnevisionImageProcessorPil(
            size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]]
        )
        return _ImagesOnly(
            image_processor,
            tokenizer,
            None,
            num_image_tokens=4,
            vision_feature_select_strategy="full",
        )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        image_token=one.image_token,
    )

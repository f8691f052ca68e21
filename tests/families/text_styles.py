"""How text families write a chat: their special tokens and a template in each family's style."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tests.families.tokenizers import byte_tokenizer

BAR = "\N{FULLWIDTH VERTICAL LINE}"
LOW = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a tokenizer is built from."""

    template: str | None
    """`None`: the tokenizer of a base model, which has none."""
    tokens: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    add_bos: bool = False
    end: str | None = None
    """As in `FamilyCase`."""
    takes_system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Build it."""
        return byte_tokenizer(
            self.tokens,
            eos=self.eos,
            bos=self.bos,
            pad=self.pad,
            add_bos=self.add_bos,
            chat_template=self.template,
        )


def chatml(*, before: str = "", reply: str = "", default_system: str = "") -> str:
    """Write a template with `<|im_start|>role` lines.

    Args:
        before: Opens the chat.
        reply: Follows the assistant's header in a generation prompt and in the last answer.
        default_system: Of chats that bring no system text.
    """
    fallback = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n"
        + default_system
        + "<|im_end|>\n{% endif %}"
        if default_system
        else ""
    )
    last = "{% if loop.last and message.role == 'assistant' %}" + reply + "{% endif %}"
    return (
        before
        + fallback
        + "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        + (last if reply else "")
        + "{{ message.content }}<|im_end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        + reply
        + "{% endif %}"
    )


def marked(
    *,
    roles: dict[str, str],
    ends: dict[str, str],
    opening: str = "",
    prompt: str | None = None,
    refuse_system: bool = False,
) -> str:
    """Write a template in which every turn stands between its role's two texts.

    Args:
        roles: What stands before a turn, by role.
        ends: What stands after it, by role.
        opening: Opens the chat.
        prompt: The generation prompt; the assistant's mark when left out.
        refuse_system: Chats with a system text raise an error.
    """
    refusal = "{{ raise_exception('System role not supported') }}" if refuse_system else ""
    branches = "".join(
        ("{% if" if number == 0 else "{% elif")
        + f" message.role == '{role}' %}}"
        + (refusal if role == "system" and refuse_system else "")
        + mark
        + "{{ message.content | trim }}"
        + ends.get(role, "")
        for number, (role, mark) in enumerate(roles.items())
    )
    return (
        opening
        + "{% for message in messages %}"
        + branches
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + (roles["assistant"].rstrip(" ") if prompt is None else prompt)
        + "{% endif %}"
    )


def same_marks(before: str, after: str, **options: str | bool) -> str:
    """Write a template whose marks differ between roles by the role's name only: `ROLE`."""
    names = ("system", "user", "assistant")
    return marked(
        roles={name: before.replace("ROLE", name) for name in names},
        ends=dict.fromkeys(names, after),
        **options,  # type: ignore[arg-type]
    )


LLAMA3 = Style(
    template=same_marks(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", opening="{{ bos_token }}"
    ),
    tokens=(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eot_id|>", "<|finetune_right_pad_id|>"),
    ),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
    add_bos=True,
)

MISTRAL = Style(
    # The system text opens the last user turn.
    template=(
        "{% set system = '' %}{% set turns = messages %}"
        "{% if messages[0].role == 'system' %}"
        "{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
        "{{ bos_token }}{% for turn in turns %}{% if turn.role == 'user' %}"
        "{% set rest = turns[loop.index:] | selectattr('role', 'equalto', 'user') | list %}"
        "[INST] {% if not rest %}{{ system }}{% endif %}{{ turn.content }}[/INST]"
        "{% else %} {{ turn.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
    bos="<s>",
    eos="</s>",
    pad="<unk>",
    add_bos=True,
)

_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

QWEN2 = Style(
    template=chatml(default_system="You are a helpful assistant."),
    tokens=_CHATML_TOKENS,
    eos="<|im_end|>",
    pad="<|endoftext|>",
)

QWEN3 = Style(
    template=chatml(reply="<think>\n\n</think>\n\n"),
    tokens=_CHATML_TOKENS,
    eos="<|im_end|>",
    pad="<|endoftext|>",
)

CHATML = Style(template=chatml(), tokens=_CHATML_TOKENS, eos="<|im_end|>", pad="<|endoftext|>")

LFM2 = Style(
    template=chatml(before="{{ bos_token }}"),
    tokens=("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    bos="<|startoftext|>",
    eos="<|im_end|>",
    pad="<|pad|>",
    add_bos=True,
)

GEMMA = Style(
    template=marked(
        roles={
            "system": "",
            "user": "<start_of_turn>user\n",
            "assistant": "<start_of_turn>model\n",
        },
        ends={"user": "<end_of_turn>\n", "assistant": "<end_of_turn>\n"},
        opening="{{ bos_token }}",
        refuse_system=True,
    ),
    tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    add_bos=True,
    end="<end_of_turn>",
    takes_system=False,
)

PHI3 = Style(
    template=same_marks("<|ROLE|>\n", "<|end|>\n"),
    tokens=("<unk>", "<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    bos="<s>",
    eos="<|endoftext|>",
    end="<|end|>",
)

OLMO = Style(
    template=marked(
        roles={"system": "<|system|>\n", "user": "<|user|>\n", "assistant": "<|assistant|>\n"},
        ends={"system": "\n", "user": "\n", "assistant": "{{ eos_token }}\n"},
        opening="{{ bos_token }}",
    ),
    tokens=("<|endoftext|>", "<|pad|>", "<|bos|>"),
    bos="<|bos|>",
    eos="<|endoftext|>",
    pad="<|pad|>",
)

COHERE = Style(
    template=marked(
        roles={
            name: f"<|START_OF_TURN_TOKEN|><|{mark}_TOKEN|>"
            for name, mark in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
        },
        ends=dict.fromkeys(("system", "user", "assistant"), "<|END_OF_TURN_TOKEN|>"),
        opening="{{ bos_token }}",
    ),
    tokens=(
        *("<PAD>", "<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>"),
        *("<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    pad="<PAD>",
    add_bos=True,
)

GRANITE = Style(
    template=same_marks("<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n"),
    tokens=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>"),
    bos="<|end_of_text|>",
    eos="<|end_of_text|>",
    pad="<|pad|>",
)

GLM4 = Style(
    # No token ends a turn; the next one's mark does.
    template=same_marks("<|ROLE|>\n", "", opening="[gMASK]<sop>"),
    tokens=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    eos="<|endoftext|>",
)

HARMONY = Style(
    template=(
        "<|start|>system<|message|>Reasoning: low<|end|>"
        "{% for message in messages %}{% if message.role == 'system' %}"
        "<|start|>developer<|message|># Instructions\n\n{{ message.content }}<|end|>"
        "{% elif message.role == 'user' %}<|start|>user<|message|>{{ message.content }}<|end|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    tokens=(
        *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|end|>"),
        *("<|message|>", "<|channel|>"),
    ),
    bos="<|startoftext|>",
    eos="<|return|>",
    pad="<|endoftext|>",
)

DEEPSEEK = Style(
    template=marked(
        roles={
            "system": "",
            "user": f"<{BAR}User{BAR}>",
            "assistant": f"<{BAR}Assistant{BAR}>",
        },
        ends={"assistant": "{{ eos_token }}"},
        opening="{{ bos_token }}",
    ),
    tokens=(
        *(f"<{BAR}begin{LOW}of{LOW}sentence{BAR}>", f"<{BAR}end{LOW}of{LOW}sentence{BAR}>"),
        *(f"<{BAR}{LOW}pad{LOW}{BAR}>", f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"),
    ),
    bos=f"<{BAR}begin{LOW}of{LOW}sentence{BAR}>",
    eos=f"<{BAR}end{LOW}of{LOW}sentence{BAR}>",
    pad=f"<{BAR}{LOW}pad{LOW}{BAR}>",
    add_bos=True,
)

JAMBA = Style(
    template=same_marks("<|bom|><|ROLE|> ", "<|eom|>", opening="{{ bos_token }}"),
    tokens=(
        *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|bom|>", "<|eom|>"),
        *("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    bos="<|startoftext|>",
    eos="<|eom|>",
    pad="<|pad|>",
    add_bos=True,
)

EXAONE = Style(
    template=same_marks("[|ROLE|]\n", "[|endofturn|]\n"),
    tokens=("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|endofturn|]"),
    bos="[BOS]",
    eos="[|endofturn|]",
    pad="[PAD]",
)

ERNIE = Style(
    template=marked(
        roles={"system": "", "user": "User: ", "assistant": "Assistant: "},
        ends={"system": "\n", "user": "\n", "assistant": "<|end_of_sentence|>"},
        opening="<|begin_of_sentence|>",
    ),
    tokens=("<unk>", "<s>", "</s>", "<pad>", "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    end="<|end_of_sentence|>",
)

HUNYUAN = Style(
    template=marked(
        roles={
            "system": "",
            "user": f"<{BAR}hy_User{BAR}>",
            "assistant": f"<{BAR}hy_Assistant{BAR}>",
        },
        ends={
            "system": f"<{BAR}hy_place{LOW}holder{LOW}no{LOW}3{BAR}>",
            "assistant": f"<{BAR}hy_place{LOW}holder{LOW}no{LOW}2{BAR}>",
        },
        opening="{{ bos_token }}",
    ),
    tokens=(
        *(f"<{BAR}hy_begin{LOW}of{LOW}sentence{BAR}>", f"<{BAR}hy_end{LOW}of{LOW}sentence{BAR}>"),
        *(f"<{BAR}hy_{LOW}pad{LOW}{BAR}>", f"<{BAR}hy_User{BAR}>", f"<{BAR}hy_Assistant{BAR}>"),
        *(f"<{BAR}hy_place{LOW}holder{LOW}no{LOW}{n}{BAR}>" for n in (2, 3)),
    ),
    bos=f"<{BAR}hy_begin{LOW}of{LOW}sentence{BAR}>",
    eos=f"<{BAR}hy_place{LOW}holder{LOW}no{LOW}2{BAR}>",
    pad=f"<{BAR}hy_{LOW}pad{LOW}{BAR}>",
)

BASE = Style(template=None, tokens=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>")
"""A base model's: no template, and one token for begin, end and padding."""

OPT = Style(
    template=None,
    tokens=("<s>", "<pad>", "</s>", "<unk>"),
    bos="</s>",
    eos="</s>",
    pad="<pad>",
    add_bos=True,
)

BLOOM = Style(
    template=None, tokens=("<unk>", "<s>", "</s>", "<pad>"), bos="<s>", eos="</s>", pad="<pad>"
)

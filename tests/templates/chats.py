"""Chats that templates have been seen to get wrong."""

_Turn = tuple[str, str]


def _chat(*turns: _Turn) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


CHATS: dict[str, list[dict[str, str]]] = {
    "one turn": _chat(("user", "What is it?"), ("assistant", "An apple.")),
    "system": _chat(("system", "Be brief."), ("user", "Name a fruit"), ("assistant", "Apple")),
    "angle brackets": _chat(
        ("user", "q1"),
        ("assistant", "<answer>one</answer>"),
        ("user", "q2"),
        ("assistant", "<b>two</b> <"),
    ),
    "system and three turns": _chat(
        ("system", "System text"),
        ("user", "q1"),
        ("assistant", "first answer"),
        ("user", "q2"),
        ("assistant", "second answer"),
        ("user", "q3"),
        ("assistant", "third"),
    ),
    "equal turns": _chat(
        ("user", "yes"), ("assistant", "yes"), ("user", "yes"), ("assistant", "yes")
    ),
    "opened by the assistant": _chat(
        ("assistant", "Ahoy! The office is open"), ("user", "hi"), ("assistant", "name?")
    ),
    "the assistant only": _chat(("assistant", "Ahoy!")),
    "blanks around": _chat(("user", "q"), ("assistant", "  indented\n code\n")),
    "line breaks first": _chat(("user", "q"), ("assistant", "\n\nafter line breaks")),
    "thoughts": _chat(
        ("user", "q"),
        ("assistant", "<think>\na reason\n</think>\n\nanswer"),
        ("user", "q2"),
        ("assistant", "<think>\nmore\n</think>\n\nfinal"),
    ),
    "short thoughts": _chat(("user", "q"), ("assistant", "<think>r</think>a")),
    "template syntax": _chat(("user", "{{ x }}"), ("assistant", "{% if a %} {{ y }} {# c #}")),
    "combining marks and emoji": _chat(("user", "q"), ("assistant", "\u0301é👍🏽 ok")),
    "a question last": _chat(("user", "q"), ("assistant", "a"), ("user", "more?")),
    "a call as text": _chat(("user", "q"), ("assistant", '[{"name": "x"}]')),
}

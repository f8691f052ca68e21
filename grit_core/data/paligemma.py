"""PaliGemma's prompts as a chat template: it has none, and reads a question with its images."""

from typing import Any, Final

TEMPLATE: Final = (
    "{%- if messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('PaliGemma has no place for a ' + messages[0]['role'] + ' message before"
    " the question; write it into the question') }}"
    "{%- elif messages | length > 2 -%}"
    "{{ raise_exception('PaliGemma takes one question and one answer, and the chat has '"
    " + messages | length | string + ' messages; make a row of each question') }}"
    "{%- elif messages[0]['content'] is string -%}"
    "{{ raise_exception('PaliGemma takes a message as a list of parts') }}"
    "{%- endif -%}"
    "{%- set state = namespace(text='') -%}"
    "{%- for part in messages[0]['content'] -%}"
    "{%- if part['type'] == 'text' -%}{%- set state.text = state.text + part['text'] -%}"
    "{%- elif state.text -%}"
    "{{ raise_exception('PaliGemma reads its images before the text; put them first') }}"
    "{%- else -%}<image>{%- endif -%}"
    "{%- endfor -%}"
    "{{ bos_token + state.text + '\n' }}"
    "{%- for message in messages[1:] -%}"
    "{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{{ eos_token }}"
    "{%- endfor -%}"
)
"""Images, BOS, the question and a line feed, as its processor writes them; then the answer."""


def find_template(processor: Any) -> str | None:
    """Return the template of a processor that has none, where this family's fits it."""
    return TEMPLATE if type(processor).__name__ == "PaliGemmaProcessor" else None

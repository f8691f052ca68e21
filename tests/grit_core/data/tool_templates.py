"""Chat templates with tools in the forms of several families, in our own words."""

_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{{ 'Functions:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' or message.role == 'tool' %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + (message.content or '') }}"
)
_TAIL = (
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TAGGED_CALLS = (
    "{% for call in message.tool_calls or [] %}"
    "{% if not loop.first or message.content %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \''
    " + (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
)

TAGGED = _HEAD + _TAGGED_CALLS + _TAIL
"""Qwen's and Hermes'."""

TEXT_ARGUMENTS = (
    _HEAD + "{% for call in message.tool_calls or [] %}"
    "{{ '<|call_begin|>' + call.function.name + '\n```json\n' + call.function.arguments"
    " + '\n```<|call_end|>' }}{% endfor %}" + _TAIL
)
"""DeepSeek's: the arguments are taken as text."""

THINKING = TAGGED.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
"""Opens a thought in the prompt, and drops it from a finished turn."""

XML = (
    _HEAD + "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call><function=' + call.function.name + '>' }}"
    "{% for key, value in call.function.arguments.items() %}{{ '<parameter=' + key + '>'"
    " + (value | string) + '</parameter>' }}{% endfor %}{{ '</function></tool_call>' }}{% endfor %}"
    + _TAIL
)
"""Qwen3-Coder's: one tag for each argument, which is no JSON."""

UNTAGGED = (
    "{% if tools %}{{ '<|start|>system<|end_header|>' }}{% for tool in tools %}"
    "{{ (tool | tojson) + '\n' }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'assistant' and message.tool_calls %}"
    "{% if message.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    '{{ \'<|start|>assistant<|end_header|>{"name": "\' + call.name + \'", "parameters": \''
    " + (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}"
    "{{ '<|start|>ipython<|end_header|>' + (message.content | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ '<|start|>' + message.role + '<|end_header|>' + message.content + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end_header|>' }}{% endif %}"
)
"""Llama's: a call is known by the answer's first characters, and stands on its own."""

BRACKETED = (
    "{{ '<s>' }}{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools and loop.first %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}"
    "{% elif message.role == 'tool' %}"
    '{{ \'[TOOL_RESULTS]{"content": "\' + message.content + \'", "call_id": "\''
    " + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% elif message.tool_calls %}{{ '[TOOL_CALLS][' }}{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    '{{ \'{"name": "\' + call.function.name + \'", "arguments": \''
    " + (call.function.arguments | tojson) + ', \"id\": \"' + call.id + '\"}' }}"
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']</s>' }}"
    "{% else %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
)
"""Mistral's: a list behind a control token, with ids of nine characters."""

PLAIN = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Without tools."""

ALTERNATING = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST]' + message.content + '[/INST]' }}"
    "{% else %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
)
"""Without tools and system messages; turns alternate strictly."""

OWN = {
    "tagged": TAGGED,
    "text_arguments": TEXT_ARGUMENTS,
    "thinking": THINKING,
    "untagged": UNTAGGED,
    "bracketed": BRACKETED,
}
FALLBACK = {"xml": XML, "plain": PLAIN, "alternating": ALTERNATING}

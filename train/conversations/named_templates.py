"""Chat templates by name, in Jinja as in a tokenizer's own chat_template.

None begins with the token that begins a text: `ChatTemplate` adds it where the
tokenizer has it.
"""

_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_ASK = " Write a response that appropriately completes the request."

_ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{% set has_input = message['input'] %}"
    f"{{% if loop.first %}}{{{{ '{_TASK}' }}}}"
    f"{{% if has_input %}}{{{{ '{_INPUT}' }}}}{{% endif %}}"
    f"{{{{ '.{_ASK}\\n\\n' }}}}{{% endif %}}"
    "{{ '### Instruction:\\n' }}"
    "{% if has_input %}"
    "{{ message['instruction'] + '\\n\\n### Input:\\n' + message['input'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n\\n### Response:' }}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
_PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

TEMPLATES: dict[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "llama2": _LLAMA2,
    "plain": _PLAIN,
}
# Special tokens, besides the end of a text, that a template needs.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}

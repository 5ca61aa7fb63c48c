"""Chat templates with the peculiarities of real ones. In `TALK` the assistant alone writes capitals."""

from mtp_jax.data.chat import ChatTemplate

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " HELLO "},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "BYE"},
]
_PROMPT = "{% if add_generation_prompt %}(assistant){% endif %}"
BARE = "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}{% endfor %}" + _PROMPT
MARKED = (
    "{% for m in messages %}({{ m['role'] }})"
    "{%- if m['role'] == 'assistant' %}{%- generation -%}{{ m['content'] | trim }}{%- endgeneration -%}|"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}" + _PROMPT
)
STRIPS = "{{ bos_token }}{% for m in messages %}({{ m['role'] }}){{ m['content'] | trim }}</s>{% endfor %}" + _PROMPT
DROPS_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}({{ m['role'] }}){{ m['content'] }}{% endfor %}" + _PROMPT
)
SHAPELESS = "{{ messages | length }} messages " + BARE
FORGETS = (
    "{% for m in messages %}({{ m['role'] }})"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}{% endfor %}" + _PROMPT
)
"""Writes earlier answers as nothing, as some templates do with an earlier turn's reasoning."""


def template(text, origin="a template"):
    return ChatTemplate(origin, text, {"bos_token": "<s>", "eos_token": "<|eos|>"})


def texts_of(text, spans):
    return [text[start:stop] for start, stop in spans]

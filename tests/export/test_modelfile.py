"""Ollama's template says what the Jinja template says, and where it cannot, there is none."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qswitch.errors import DataError
from qswitch.export.modelfile import find_layout, modelfile

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set r = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set r = messages %}{% endif %}"
    "{% for m in r %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
    "{{ s if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set r = messages[1:] %}{% else %}{% set s = '' %}{% set r = messages %}{% endif %}"
    "{% for m in r %}{% if m.role == 'user' %}<s>[INST] {{ s if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ refuse() }}{% endif %}" + CHATML.replace("Be kind.", "")
COUNTS = "{% for m in messages %}{{ loop.index }}:{{ m.content }};{% endfor %}"
SHOUTS = "{% for m in messages %}{{ m.content | upper }};{% endfor %}"

CONVERSATIONS = [
    [("user", "hi")],
    [("system", "Answer."), ("user", "hi")],
    [("user", "hi"), ("assistant", "ho"), ("user", "why?")],
    [("system", "Answer."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def renderer(template: str):
    compiled = ImmutableSandboxedEnvironment().from_string(template)

    def refuse():
        raise DataError("no system message")

    def render(messages):
        turns = [{"role": role, "content": content} for role, content in messages]
        return compiled.render(messages=turns, add_generation_prompt=True, refuse=refuse)

    return render


@pytest.mark.parametrize(("template", "start"), [(CHATML, ""), (GEMMA, "<bos>"), (LLAMA2, "<s>"), (THINKING, "")])
def test_the_layout_renders_what_the_template_does(template, start):
    render = renderer(template)
    layout = find_layout(render, start=start)
    assert layout is not None
    for messages in CONVERSATIONS:
        assert layout.render(messages) == render(messages).removeprefix(start)


def test_a_template_without_system_messages_has_a_layout_without_them():
    layout = find_layout(renderer(REFUSES_SYSTEM))
    assert layout is not None and layout.before_system is None and 'eq .Role "system"' not in layout.template


@pytest.mark.parametrize("template", [COUNTS, SHOUTS])
def test_a_template_that_is_no_fixed_text_has_none(template):
    assert find_layout(renderer(template)) is None


def test_the_template_in_the_language_of_go():
    layout = find_layout(renderer(CHATML))
    assert layout is not None
    assert layout.template == (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '<|im_start|>user\n{{ end }}{{ if eq .Role "user" }}{{ if eq $i 0 }}<|im_start|>system\nBe kind.<|im_end|>\n'
        "<|im_start|>user\n{{ end }}{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        '{{ if eq .Role "assistant" }}{{ .Content }}{{ if not (eq (len (slice $.Messages $i)) 1) }}<|im_end|>\n'
        "<|im_start|>user\n{{ end }}{{ end }}{{ end }}"
    )


def test_a_modelfile_names_file_system_message_and_every_end_token():
    text = modelfile(
        "s-q8_0.gguf",
        find_layout(renderer(CHATML)),
        system="Be brief.",
        stop=["</s>", "<|im_end|>"],
        others=["s-f16.gguf"],
    )
    lines = text.splitlines()
    assert "FROM ./s-q8_0.gguf" in lines and 'SYSTEM """Be brief."""' in lines and "s-f16.gguf" in lines[0]
    assert 'PARAMETER stop "</s>"' in lines and 'PARAMETER stop "<|im_end|>"' in lines
    assert "TEMPLATE" not in modelfile("x.gguf", None, system=None, stop=[])

"""Models that think before they answer: the word that tells their chat templates not to, and thoughts that a prompt
opens. Cold.

Qwen 3, Qwen 3.5, SmolLM 3 and others think unless the template is told otherwise. The templates of DeepSeek's R1 and
of Qwen 3's Thinking models offer no choice: their prompts end with a thought that is opened, which the model goes on
with.
"""

from __future__ import annotations

import re

THINKING = "enable_thinking"
"""The name under which their templates read it; a key of data.template_kwargs."""
THINKING_TOKENS = 2048
"""Response limit at which most questions are thought through and answered; with less a response may end before its
answer begins."""
THOUGHT_MARK = "<think>"
"""What their thinking begins with."""
THOUGHT_END = "</think>"
"""What it ends with, before the answer."""


def reads_thinking(template: str) -> bool:
    """Whether a Jinja template reads `enable_thinking`."""
    return re.search(rf"\b{THINKING}\b", template) is not None


def opened_thought(prompt: str) -> str:
    """The mark of a thought with which the text of a prompt ends, so that the response begins inside of it, and what
    follows the mark; empty where it ends otherwise."""
    _, mark, space = prompt.rpartition(THOUGHT_MARK)
    return mark + space if mark and not space.strip() else ""


def after_opened_thought(prompt: str, response: str) -> str:
    """The response without the mark with which its thought begins, where the prompt has written it already."""
    rest = response.lstrip()
    opened = opened_thought(prompt)
    if not opened or not rest.startswith(THOUGHT_MARK):
        return response
    return rest.removeprefix(THOUGHT_MARK).removeprefix(opened.removeprefix(THOUGHT_MARK))

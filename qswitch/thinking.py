"""How models that think before they answer are told not to: the word that their chat templates read. Cold.

Qwen 3, Qwen 3.5, SmolLM 3 and others think unless the template is told otherwise. Knows nothing of models whose
template offers no choice.
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


def reads_thinking(template: str) -> bool:
    """Whether a Jinja template reads `enable_thinking`."""
    return re.search(rf"\b{THINKING}\b", template) is not None

"""A chat template as Ollama writes it, and the Modelfile around it.

Ollama does not run the Jinja template that a GGUF file carries: it has templates of its own language for those that it
recognises. So the text between the messages is found by rendering the Jinja template with marked messages, and written
as a template of Ollama's. Knows no tokenizer and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qswitch.errors import DataError

Render = Callable[[list[tuple[str, str]]], str]
"""(role, content) of each message -> the prompt, ending where the response begins."""

_MARKS = {"system": "Q7system7Q", "user": "Q7user7Q", "assistant": "Q7assistant7Q", "user2": "Q7user27Q"}


@dataclass(frozen=True, slots=True)
class ChatLayout:
    """The text that a chat template puts around messages that alternate between user and assistant."""

    before_user: str
    """Before the first user message where there is no system message."""
    before_system: str | None
    """None where the template takes no system message."""
    after_system: str
    before_reply: str
    """From the last user message to where the response begins."""
    before_earlier_reply: str
    """From an earlier user message to the reply that stands there."""
    after_reply: str
    """From an earlier reply to the next user message."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """What Ollama makes of the messages with `template`."""
        text = ""
        for i, (role, content) in enumerate(messages):
            last = i == len(messages) - 1
            if role == "system":
                text += f"{self.before_system}{content}{self.after_system}"
            elif role == "user":
                text += self.before_user if i == 0 else ""
                text += content + (self.before_reply if last else self.before_earlier_reply)
            else:
                text += content + ("" if last else self.after_reply)
        return text

    @property
    def template(self) -> str:
        """The same in the template language of Go, which Ollama uses."""
        last = "eq (len (slice $.Messages $i)) 1"
        before_reply = _text(self.before_reply)
        if self.before_reply != self.before_earlier_reply:
            earlier = _text(self.before_earlier_reply)
            before_reply = f"{{{{ if {last} }}}}{before_reply}{{{{ else }}}}{earlier}{{{{ end }}}}"
        system = ""
        if self.before_system is not None:
            before, after = _text(self.before_system), _text(self.after_system)
            system = f'{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        return (
            "{{ range $i, $_ := .Messages }}"
            + system
            + f'{{{{ if eq .Role "user" }}}}{{{{ if eq $i 0 }}}}{_text(self.before_user)}{{{{ end }}}}'
            + f"{{{{ .Content }}}}{before_reply}{{{{ end }}}}"
            + '{{ if eq .Role "assistant" }}{{ .Content }}'
            + f"{{{{ if not ({last}) }}}}{_text(self.after_reply)}{{{{ end }}}}{{{{ end }}}}"
            + "{{ end }}"
        )


def find_layout(render: Render, *, start: str = "") -> ChatLayout | None:
    """The layout of a chat template, or None where it is not made of fixed text around the messages.

    `start` is the begin-of-text token where the template writes it: the engine adds it, so the layout has it not.
    """

    def ours(messages: list[tuple[str, str]]) -> str:
        return render(messages).removeprefix(start)

    user, user2 = ("user", _MARKS["user"]), ("user", _MARKS["user2"])
    system, assistant = ("system", _MARKS["system"]), ("assistant", _MARKS["assistant"])
    one = _between(ours([user]), user)
    several = _between(ours([user, assistant, user2]), user, assistant, user2)
    if one is None or several is None:
        return None
    before_system, after_system = None, ""
    try:
        with_system = _between(ours([system, user]), system, user)
    except DataError:  # a template may refuse a system message
        with_system = None
    if with_system is not None:
        before_system, after_system = with_system[:2]
    layout = ChatLayout(
        before_user=one[0],
        before_system=before_system,
        after_system=after_system,
        before_reply=one[1],
        before_earlier_reply=several[1],
        after_reply=several[2],
    )
    longer = [user, assistant, user2, ("assistant", "7Z"), ("user", "Z7")]
    conversations = [[user], longer] + ([[system, user], [system, *longer]] if before_system is not None else [])
    return layout if all(layout.render(c) == ours(c) for c in conversations) else None


def modelfile(
    gguf_name: str, layout: ChatLayout | None, *, system: str | None, stop: Sequence[str], others: Sequence[str] = ()
) -> str:
    """A Modelfile for `ollama create`: the GGUF file beside it, template, system message and end tokens."""
    lines = [f"# ollama create NAME -f Modelfile{''.join(f'; also here: {name}' for name in others)}"]
    lines += [f"FROM ./{gguf_name}", ""]
    if layout is not None and '"""' not in layout.template:
        lines += [f'TEMPLATE """{layout.template}"""', ""]
    else:
        lines += [
            "# The chat template is not fixed text around the messages, so Ollama chooses one by the template in the",
            "# GGUF file. Compare its answers with `qswitch generate`.",
            "",
        ]
    if system and '"""' not in system:
        lines += [f'SYSTEM """{system}"""', ""]
    lines += [f'PARAMETER stop "{text}"' for text in stop if '"' not in text]
    return "\n".join(lines) + "\n"


def _between(text: str, *messages: tuple[str, str]) -> list[str] | None:
    """The pieces around the messages' contents; None where one is missing, doubled or out of order."""
    pieces = []
    for _, content in messages:
        if text.count(content) != 1:
            return None
        piece, _, text = text.partition(content)
        pieces.append(piece)
    return [*pieces, text]


def _text(literal: str) -> str:
    """Text that a Go template writes as it is."""
    return literal.replace("{{", '{{ "{{" }}')

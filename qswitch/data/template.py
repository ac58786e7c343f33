"""Which token ids both models read for a record: the template, and the response that continues it.

One template serves teacher and student. Knows nothing of files, order or models. Tensors are built in `pad_left` only.
The file is long because the ids of a prompt, of its response and of every turn between must come from one rendering.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qswitch.data.records import Record
from qswitch.data.turns import Message
from qswitch.errors import DataError, FileError
from qswitch.models.vocab import PROBES
from qswitch.outside import read_text, user_path
from qswitch.thinking import after_opened_thought
from qswitch.time_limit import time_limit

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

RENDER_LIMIT_S = 5.0
"""Of one record. A template is a program from outside, and takes about a millisecond."""
ALPACA_INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ALPACA_INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
# The same layouts for messages, as the exported student carries them.
_ALPACA_JINJA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ '" + ALPACA_INTRO.replace("\n", "\\n") + "' }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '### Instruction:\n' + message.content + '\n\n### Response:\n' }}"
    "{% elif message.role == 'assistant' %}{{ message.content }}"
    "{% if loop.last %}{{ eos_token }}{% else %}{{ '\n\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
).replace("\n", "\\n")
_PLAIN_JINJA = (
    "{% for message in messages %}"
    "{% if not loop.first and message.role != 'assistant' %}{{ '\\n\\n' }}{% endif %}{{ message.content }}"
    "{% if loop.last and message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Prompt:
    """A record as both models read it."""

    example_id: int
    prompt_ids: list[int]
    response_ids: list[int] | None
    """Ground truth with its end token (without it when it was cut to the limit); None without one."""
    text: str
    """The prompt after the template, as text."""
    max_new_tokens: int | None = None
    """Response limit of this example, tokens; None: the run's."""
    earlier_turns: tuple[tuple[int, int], ...] = ()
    """[start, end) within prompt_ids of the assistant's earlier turns, which ground-truth training learns too."""
    left_out: tuple[str, ...] = ()
    """What the record holds and these ids do not, because the template does not read it."""


class PromptEncoder:
    """Turns records into token ids with one tokenizer and one template.

    Args:
        tokenizer: of the model whose template is used; both models map text to the same ids.
        template: `teacher` or `student` (the chat template of `tokenizer`), `alpaca`, `plain`, or a Jinja file that
            reads `messages` and `add_generation_prompt`.
        end_token_ids: further tokens that end a response, for example of the generation config (Gemma's end of turn).
        template_kwargs: what a Jinja template is told beside the turns, unless a record says otherwise.

    Raises:
        DataError: the template file is missing or is no Jinja template, or the template does not read one of
            `template_kwargs`.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "teacher",
        *,
        end_token_ids: Sequence[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._jinja: str | None = None
        self._kind = template if template in ("alpaca", "plain") else "jinja"
        if template in ("teacher", "student"):
            self._jinja = _chat_template(tokenizer)
            if self._jinja is None:
                logger.warning(
                    "The tokenizer has no chat template (a base model), so the Alpaca template is used. "
                    "Set data.template=alpaca to say so, or name a Jinja file."
                )
                self._kind = "alpaca"
        elif self._kind == "jinja":
            self._jinja = _read_template(user_path(template))
        own_end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.end_token_ids = list(dict.fromkeys([*own_end, *map(int, end_token_ids)]))
        self._start_ids = _start_ids(tokenizer)
        if self._jinja is not None:
            _check_template(self, template)
        for name in self.template_kwargs:
            if not self.reads(name):
                words = set(re.findall(r"\w+", self._jinja or ""))
                near = difflib.get_close_matches(name, words, n=1, cutoff=0.8)
                hint = f"Did you mean {near[0]}?" if near else "Remove it."
                raise DataError(f"data.template_kwargs.{name}: the template does not read it. {hint}")

    def reads(self, name: str) -> bool:
        """Whether the template mentions `name` at all: a field of a turn, `tools`, or an argument."""
        return self._jinja is not None and re.search(rf"\b{re.escape(name)}\b", self._jinja) is not None

    @functools.cached_property
    def _prints_tool_turns(self) -> bool:
        """Whether the text of a tool's turn is in the rendered prompt; some templates pass over unknown roles."""
        if self._jinja is None:
            return False
        probe = "a probe of the template"
        call = {"type": "function", "function": {"name": "probe", "arguments": {}}}
        asked = (Message("user", "?"), Message("assistant", "", {"tool_calls": [call]}))
        try:
            record = Record(0, (*asked, Message("tool", probe, {"name": "probe"})), None, "the template probe")
            return probe in self._render_chat(record)
        except DataError:
            return True  # it may refuse the probe for what a record does not have; then the record's own turn shows

    def closing_token_id(self) -> int | None:
        """The special token with which a Jinja template closes an answer; None where it writes none after one."""
        if self._jinja is None:
            return None
        answer = "a probe of the answer"
        text = self._render_chat(Record(0, (Message("user", "?"),), answer, "the template probe"), whole=True)
        special = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        after = self.tokenizer(text.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
        return next((i for i in after if i in special), None)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the token ids of some record would: by the tokenizer, the template or the end tokens."""
        return hashlib.sha256(
            json.dumps(
                [_tokenizer_content(self.tokenizer), self._kind, self._jinja, self.end_token_ids, self.template_kwargs]
            ).encode()
        ).hexdigest()

    def render(self, record: Record) -> str:
        """The prompt of `record` as text, ending where the response begins."""
        if self._kind == "alpaca":
            return _alpaca_text(record)
        if self._kind == "plain":
            return _plain_text(record)
        return self._render_chat(record)

    def encode(self, record: Record) -> Prompt:
        """Token ids of one record, nothing cut. Same as `encode_batch([record])[0]`."""
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[Record]) -> list[Prompt]:
        """Token ids of the records, nothing cut.

        The response is what the tokenizer makes of the whole conversation after the prompt, so that it reads as the
        model would have written it; where the whole does not begin with the prompt's ids, it is tokenised apart: what
        the template puts after the prompt's text or, where it renders the prompt otherwise too, the record's answer.

        Raises:
            DataError: the template refuses a record, or a response cannot be ended; names file and line.
        """
        for record in records:
            self._refuse_what_has_no_place(record)
        texts = [self.render(r) for r in records]
        prompt_ids = self._tokenize(texts)
        answered = [i for i, r in enumerate(records) if r.has_response]
        if answered and not self.end_token_ids:
            raise DataError(
                f"{records[answered[0]].source}: the tokenizer has no end-of-sequence token, so the response cannot be "
                "ended. Set eos_token in the model's tokenizer_config.json."
            )
        wholes = [self._whole_text(records[i], texts[i]) for i in answered]
        responses: dict[int, list[int]] = {}
        left_out = {i: self._left_out(record) for i, record in enumerate(records)}
        for i, text, whole in zip(answered, wholes, self._tokenize(wholes), strict=True):
            start = prompt_ids[i]
            if len(whole) > len(start) and whole[: len(start)] == start:
                responses[i] = self._ended(whole[len(start) :])
                continue
            if text.startswith(texts[i]):
                apart = text[len(texts[i]) :]
            elif "tool_calls" in records[i].response_extra:
                raise DataError(
                    f"{records[i].source}: the chat template renders this conversation otherwise than its prompt, "
                    "so where the answer with its tool calls begins is not to be told. Set data.template_kwargs "
                    "so that both agree (enable_thinking, for example), or remove this record."
                )
            else:
                apart = after_opened_thought(texts[i], records[i].response or "")
                left_out[i] += tuple(f"turns.{key}" for key in records[i].response_extra if self.reads(key))
            responses[i] = self._ended(self.tokenizer(apart, add_special_tokens=False)["input_ids"])
        for i in answered:
            if records[i].teacher_response == "cut":
                responses[i] = responses[i][:-1]
        spans = self._earlier_turns(records, prompt_ids)
        return [
            Prompt(
                example_id=record.id,
                prompt_ids=prompt_ids[i],
                response_ids=responses.get(i),
                text=texts[i],
                max_new_tokens=record.max_new_tokens,
                earlier_turns=spans.get(i, ()),
                left_out=left_out[i],
            )
            for i, record in enumerate(records)
        ]

    def _refuse_what_has_no_place(self, record: Record) -> None:
        """Turns that the template would leave out, so that the model would read another conversation."""
        extras = [*(m.extra for m in record.messages), record.response_extra]
        if any("tool_calls" in extra for extra in extras) and not self.reads("tool_calls"):
            raise DataError(
                f"{record.source}: the assistant calls a tool, but the template has no place for tool_calls. Name a "
                "Jinja file that has in data.template, or remove these records."
            )
        if any(m.role == "tool" for m in record.messages) and not self._prints_tool_turns:
            raise DataError(
                f"{record.source}: the conversation holds a tool's turn, which the template leaves out. Name a Jinja "
                "file that prints it in data.template, or remove these records."
            )

    def _left_out(self, record: Record) -> tuple[str, ...]:
        """What a record says that the template does not read."""
        extras = [*(m.extra for m in record.messages), record.response_extra]
        named = [("turns.", key) for extra in extras for key in extra]
        named += [("chat_template_kwargs.", key) for key in record.template_kwargs]
        named += [("", "tools")] if record.tools else []
        return tuple(dict.fromkeys(f"{where}{key}" for where, key in named if not self.reads(key)))

    def _earlier_turns(
        self, records: Sequence[Record], prompt_ids: Sequence[list[int]]
    ) -> dict[int, tuple[tuple[int, int], ...]]:
        """Record -> [start, end) of every earlier assistant turn in its prompt, the turn's end token included.

        A turn begins where the prompt up to it ends. Templates that print earlier turns otherwise than the last one
        (without their thinking, for instance) have no such place, and that turn is context only.
        """
        places = [
            (i, turn)
            for i, record in enumerate(records)
            for turn, message in enumerate(record.messages)
            if message.role == "assistant" and turn > 0 and record.teacher_response is None
        ]
        before, upto = [], []
        for i, turn in places:
            record = records[i]
            said = record.messages[turn]
            head = replace(
                record, messages=record.messages[:turn], response=None, response_extra={}, instruction=None, input=""
            )
            text = self.render(head)
            before.append(text)
            upto.append(self._whole_text(replace(head, response=said.content, response_extra=said.extra), text))
        spans: dict[int, tuple[tuple[int, int], ...]] = {}
        for (i, turn), start_ids, end_ids in zip(places, self._tokenize(before), self._tokenize(upto), strict=True):
            whole, start = prompt_ids[i], len(start_ids)
            if whole[:start] != start_ids or end_ids[:start] != start_ids:
                continue
            length = _turn_length(
                end_ids[start:],
                whole[start:],
                self.end_token_ids,
                calls="tool_calls" in records[i].messages[turn].extra,
            )
            if length:
                spans[i] = (*spans.get(i, ()), (start, start + length))
        return spans

    def _whole_text(self, record: Record, prompt_text: str) -> str:
        if self._kind == "jinja":
            return self._render_chat(record, whole=True)
        return prompt_text + (record.response or "")

    def _ended(self, ids: list[int]) -> list[int]:
        """`ids` up to and with the first end token; one is added where there is none."""
        for position, token in enumerate(ids):
            if token in self.end_token_ids:
                return ids[: position + 1]
        return [*ids, self.end_token_ids[0]]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids without special tokens but those in the text; outside chat templates the start token is put before."""
        if not texts:
            return []
        rows = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        start = self._start_ids
        if self._kind == "jinja" or not start:
            return [list(row) for row in rows]
        return [list(row) if row[: len(start)] == start else [*start, *row] for row in rows]

    def _render_chat(self, record: Record, whole: bool = False) -> str:
        """The prompt, or the whole conversation with the response's turn."""
        turns = [m.to_dict() for m in record.messages]
        if whole:
            turns.append(Message("assistant", record.response or "", record.response_extra).to_dict())
        try:
            with time_limit(RENDER_LIMIT_S, "one record"):
                return self.tokenizer.apply_chat_template(
                    turns,
                    tools=list(record.tools) or None,
                    chat_template=self._jinja,
                    tokenize=False,
                    add_generation_prompt=not whole,
                    **{**self.template_kwargs, **record.template_kwargs},
                )
        except Exception as error:  # jinja's own kinds, and whatever a template's filters raise
            system = any(m.role == "system" for m in record.messages)
            remedy = "Remove the system turn or data.system_prompt" if system else "Check the order of the turns"
            raise DataError(
                f"{record.source}: the chat template refuses this record: {error}. {remedy}, or set "
                "data.template=alpaca."
            ) from None


def template_source(encoder: PromptEncoder) -> str:
    """The Jinja chat template that the exported student should carry, so that it is asked as it was trained.

    For `alpaca` and `plain` a template that renders the same text from messages, start token included; Alpaca's
    separate input has no place among messages and is rendered as part of the instruction. What data.template_kwargs
    said in training becomes the template's default, which a caller may still set otherwise.
    """
    if encoder._jinja is not None:
        defaults = (
            f"{{%- set {name} = {name} if {name} is defined else {value!r} -%}}"
            for name, value in encoder.template_kwargs.items()
        )
        return "".join([*defaults, encoder._jinja])
    start = "{{ bos_token }}" if encoder._start_ids else ""
    return start + (_ALPACA_JINJA if encoder._kind == "alpaca" else _PLAIN_JINJA)


def fit_prompt(prompt: Prompt, max_prompt_tokens: int, max_response_tokens: int) -> Prompt | None:
    """The prompt within the run's limits: response cut, its own limit lowered; None where the prompt is too long."""
    if len(prompt.prompt_ids) > max_prompt_tokens:
        return None
    response, limit = prompt.response_ids, prompt.max_new_tokens
    if response is not None and len(response) > max_response_tokens:
        response = response[:max_response_tokens]
    if limit is not None and limit > max_response_tokens:
        limit = max_response_tokens
    if response is prompt.response_ids and limit == prompt.max_new_tokens:
        return prompt
    return replace(prompt, response_ids=response, max_new_tokens=limit)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (input_ids [B, P], attention_mask [B, P]), int64, padding on the left, P the longest row.

    Raises:
        ValueError: no rows, or an empty one.
    """
    import torch

    if not rows or not all(len(row) for row in rows):
        raise ValueError("pad_left needs at least one row, and none may be empty")
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, width - len(row) :] = torch.as_tensor(row, dtype=torch.long)
        attention_mask[i, width - len(row) :] = 1
    return input_ids, attention_mask


def _alpaca_text(record: Record) -> str:
    *earlier, last = record.messages
    text = ""
    if earlier and earlier[0].role == "system":
        text += f"{earlier.pop(0).content}\n\n"
    instruction = last.content if record.instruction is None else record.instruction
    text += ALPACA_INTRO_WITH_INPUT if record.input else ALPACA_INTRO
    for turn in earlier:
        if turn.role == "user":
            text += f"### Instruction:\n{turn.content}\n\n### Response:\n"
        elif turn.role == "assistant":
            text += f"{turn.content}\n\n"
    text += f"### Instruction:\n{instruction}\n\n"
    if record.input:
        text += f"### Input:\n{record.input}\n\n"
    return text + "### Response:\n"


def _plain_text(record: Record) -> str:
    """Turns as they are: the assistant's continues the text before it, every other begins after a blank line."""
    text = record.messages[0].content
    for turn in record.messages[1:]:
        text += turn.content if turn.role == "assistant" else f"\n\n{turn.content}"
    return text


def _turn_length(said: list[int], printed: list[int], end_token_ids: Sequence[int], *, calls: bool) -> int:
    """How many ids of `printed`, the prompt from a turn on, are that turn; 0 where it is printed otherwise than `said`.

    `calls`: it calls a tool. Qwen 3 closes an empty thinking before a call that is the last turn, and leaves it out
    before others; the rest is the same.
    """
    ends = [next((n for n, token in enumerate(ids, 1) if token in end_token_ids), None) for ids in (said, printed)]
    if ends[0] is None or ends[1] is None:  # a template without end tokens, in which the next turn may join the last id
        pairs = zip(said, printed, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(said), len(printed)))
    said, printed = said[: ends[0]], printed[: ends[1]]
    same = said == printed or (calls and said[-len(printed) :] == printed)
    return len(printed) if same else 0


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return template.get("default")
    return template


def _read_template(path: Path) -> str:
    if not path.exists():
        raise DataError(
            f"data.template={path}: no such file. Use teacher, student, alpaca, plain, or the path of a Jinja file."
        )
    try:
        return read_text(path)
    except FileError as error:
        raise DataError(f"data.template: {error}") from None


def _check_template(encoder: PromptEncoder, template: str) -> None:
    """Renders a probe, so that a broken template stops the run before any record does."""
    probe = "a probe of the template"
    try:
        with time_limit(RENDER_LIMIT_S, "one message"):
            text = encoder.tokenizer.apply_chat_template(
                [{"role": "user", "content": probe}],
                chat_template=encoder._jinja,
                tokenize=False,
                add_generation_prompt=True,
                **encoder.template_kwargs,
            )
    except Exception as error:
        raise DataError(f"data.template={template}: not a usable chat template: {error}. Mend the template.") from None
    if probe not in text:
        raise DataError(
            f"data.template={template}: the template leaves out the user's turn. It must print every message's content."
        )


def _tokenizer_content(tokenizer: Any) -> list[Any]:
    """All that decides a tokenizer's ids, as JSON; of one that is no Rust program its vocabulary and probes."""
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return [named, backend.to_str()]
    return [named, type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), *map(tokenizer.encode, PROBES)]


def _start_ids(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before every text, for example BOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for i in range(len(full) - len(plain) + 1):
        if full[i : i + len(plain)] == plain:
            return list(full[:i])
    return []

"""Responses from a finished or running run, for a person to look at or a program to read.

Knows no terminal; `chat.py` holds a conversation with the same student.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from qswitch.aside import file_aside
from qswitch.data.gather import make_encoder
from qswitch.data.records import Record, load_records
from qswitch.data.sources import iter_rows
from qswitch.data.template import PromptEncoder
from qswitch.data.turns import Message
from qswitch.distill.recovery import BatchRows, keep_to_free_memory
from qswitch.errors import ConfigError
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import context_tokens, load_teacher
from qswitch.models.pair import TokenizerPair, load_pair_tokenizer, teacher_half
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_adapter, load_student
from qswitch.rollout.adaptive_threshold import threshold_of_run
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import Policy, StudentPolicy, make_policy
from qswitch.rollout.transcript import WrittenToken, written_tokens
from qswitch.run_dir import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How the writers of a response read what is asked: their tokens, their template, and how much they can take."""

    pair: TokenizerPair
    encoder: PromptEncoder
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A response and its tokens with their writers."""

    prompt: str
    """What was asked, without the template: the last message."""
    text: str
    tokens: list[WrittenToken]


class Answerer:
    """The trained student of a run, and its teacher, read when it is first asked, ready to answer conversations.

    Args:
        run_path: run directory, finished or with a checkpoint.
        max_new_tokens: response limit; None: the run's.
        temperature: of both models; None: the run's.
        seed: of the noise that every token is drawn with.

    Raises:
        RunDirError: the run has neither a final adapter nor a checkpoint.
        ConfigError: the temperature is no number, or the limit leaves the prompt no place in the models' context.
    """

    def __init__(
        self,
        run_path: Path,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"--temperature {temperature}: give a number from 0 (greedy) on.")
        run_dir = RunDir.open(run_path)
        self.config = run_dir.config
        adapter = run_dir.trained_weights()
        self._limit = self.config.rollout.max_new_tokens if max_new_tokens is None else max_new_tokens
        context = context_tokens(self.config.student)
        if not self.config.passes_text:
            context = min(context, context_tokens(self.config.teacher))
        if max_new_tokens is not None and max_new_tokens >= context:
            raise ConfigError(
                f"--max-new-tokens {max_new_tokens}: the context of the models is {context} tokens, the prompt "
                "included. Give less."
            )
        self._runtime = make_runtime(self.config.train)
        keep_to_free_memory(self._runtime.device, self.config.teacher.num_gpus)
        pair = load_pair_tokenizer(self.config)
        self._own = _Reading(pair, make_encoder(self.config, pair), context)
        self._temperature = self.config.rollout.temperature if temperature is None else temperature
        self._seed = seed
        self._rows = BatchRows(self.config.rollout.batch_size)
        self._student = load_student(
            self.config, self._runtime, vocab_size=pair.vocab_size, base_path=run_dir.student_base_path
        )
        load_adapter(self._student, adapter)
        self._teacher: LanguageModel | None = None
        self._threshold_path = run_dir.threshold_path

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._runtime.device

    @property
    def run_policy(self) -> Policy:
        """Who writes in the run's rollouts, as its last checkpoint has it.

        Raises:
            ConfigError: as `make_threshold`; or teacher and student read different tokens.
        """
        if self.config.passes_text:
            raise ConfigError(
                "The teacher of this run has another tokenizer, so the two cannot write one response. Leave "
                "--show-writers out; /teacher in `qswitch chat` shows the teacher's own answer."
            )
        settings = self.config.rollout
        threshold = threshold_of_run(settings, self._threshold_path) if settings.policy == "switch" else None
        return make_policy(settings, threshold)

    @cached_property
    def _teachers(self) -> _Reading:
        """Of a run that passes text, what the teacher reads when it answers alone; else as the student does."""
        if not self.config.passes_text:
            return self._own
        half = teacher_half(self.config)
        pair = load_pair_tokenizer(half)
        return _Reading(pair, make_encoder(half, pair), context_tokens(half.teacher))

    def as_record(self, number: int, messages: Sequence[Message]) -> Record:
        """A conversation as a record of the run's data, the system prompt of the run before it."""
        prompt = self.config.data.system_prompt
        turns = (Message("system", prompt),) if prompt and (not messages or messages[0].role != "system") else ()
        return Record(id=number, messages=(*turns, *messages), response=None, source=f"prompt {number + 1}")

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation leaves the student's response all the tokens that it may have."""
        own = self._own
        return len(own.encoder.encode(self.as_record(0, messages)).prompt_ids) + self._limit <= own.context_tokens

    def answer(self, records: Sequence[Record], policy: Policy, *, first_id: int = 0) -> list[Generation]:
        """One response to the prompt of each record; the i-th draws the noise of example `first_id` + i.

        A response that would pass the end of the context is cut there, which is said once.

        Raises:
            DataError: the run's template refuses a conversation.
            ConfigError: a conversation fills the context of the models.
        """
        reading = self._teachers if policy.uses_teacher and not policy.uses_student else self._own
        pair, context = reading.pair, reading.context_tokens
        requests, cut = [], 0
        for i, record in enumerate(records):
            ids = reading.encoder.encode(record).prompt_ids
            room = min(self._limit, context - len(ids))
            if room < 1:
                raise ConfigError(
                    f"Prompt {first_id + i + 1} has {len(ids)} tokens, and the context of the models is {context}. "
                    "Shorten it."
                )
            cut += room < self._limit
            requests.append(RolloutRequest(first_id + i, 0, ids, room))
        if cut:
            logger.warning(
                "%d of %d responses may be cut at the end of the context of %d tokens.",
                cut,
                len(requests),
                context,
            )
        if policy.uses_teacher and self._teacher is None:
            self._teacher = load_teacher(self.config.teacher, self._runtime, vocab_size=pair.vocab_size)
        write = partial(
            rollout,
            requests,
            teacher=self._teacher if policy.uses_teacher else None,
            student=self._student if policy.uses_student else None,
            policy=policy,
            seed=self._seed,
            temperature=self._temperature,
            eos_ids=pair.eos_ids,
            pad_id=pair.pad_id,
            keep="nothing",
        )
        written, _ = self._rows.attempt(self.device, write)
        return [
            Generation(
                prompt=record.messages[-1].content,
                text=pair.tokenizer.decode(one.response_ids, skip_special_tokens=True),
                tokens=written_tokens(one, pair.tokenizer),
            )
            for record, one in zip(records, written, strict=True)
        ]


def generate_from_run(
    run_path: Path,
    asked: Sequence[str | Record],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    show_writers: bool = False,
) -> list[Generation]:
    """Let the student of a run answer each; with show_writers the run's policy writes, teacher included.

    Raises:
        RunDirError, ConfigError, DataError: as `Answerer` and its `answer`.
    """
    answerer = Answerer(run_path, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    records = [
        answerer.as_record(i, [Message("user", one)]) if isinstance(one, str) else one for i, one in enumerate(asked)
    ]
    return answerer.answer(records, answerer.run_policy if show_writers else StudentPolicy())


def read_prompts(path: Path, run_path: Path) -> list[str] | list[Record]:
    """What to ask: each line of a text file, or each record of a data file, read as the run read its own.

    A column that data.columns of the run names counts where the file has it; else the usual names do.

    Raises:
        DataError: the file cannot be read as records.
        ConfigError: there is no such file, or no line in it.
        RunDirError: `run_path` is no run directory.
    """
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: there is no such file.")
    if path.suffix != ".txt":
        data = RunDir.open(run_path).config.data
        there = {name for row in iter_rows(str(path)) for name in row.fields}
        columns = {ours: column for ours, column in data.columns.items() if column in there}
        return load_records(data.model_copy(update={"columns": columns}), str(path))
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(f"--prompts {path}: the file holds no line of text.")
    return found


def write_generations(path: Path, generations: Sequence[Generation]) -> None:
    """A JSON line for each response: the prompt, its text, and the writer of every token; whole or not at all.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    if path.exists():
        raise ConfigError(f"--output {path} exists. Choose another name, or remove it.")
    try:
        with file_aside(path) as partial:
            text = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in generations)
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written ({error.strerror}).") from error

"""Responses from a finished or running run, for a person to look at or a program to read.

Knows no terminal; `chat.py` holds a conversation with the same student.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from qswitch.aside import file_aside
from qswitch.config import DataSection
from qswitch.data.gather import make_encoder
from qswitch.data.records import Record, load_records
from qswitch.data.turns import Message
from qswitch.distill.recovery import BatchRows, keep_to_free_memory
from qswitch.errors import ConfigError
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import context_tokens, load_teacher
from qswitch.models.pair import load_pair_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_adapter, load_student
from qswitch.rollout.adaptive_threshold import threshold_of_run
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import Policy, StudentPolicy, make_policy
from qswitch.rollout.transcript import WrittenToken, written_tokens
from qswitch.run_dir import RunDir

logger = logging.getLogger(__name__)


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
        self.context_tokens = context_tokens(self.config.student)
        """The longest sequence that the models that may write were made for, prompt and response."""
        if not self.config.passes_text:
            self.context_tokens = min(self.context_tokens, context_tokens(self.config.teacher))
        if max_new_tokens is not None and max_new_tokens >= self.context_tokens:
            raise ConfigError(
                f"--max-new-tokens {max_new_tokens}: the context of the models is {self.context_tokens} tokens, the "
                "prompt included. Give less."
            )
        self._runtime = make_runtime(self.config.train)
        keep_to_free_memory(self._runtime.device, self.config.teacher.num_gpus)
        self._pair = load_pair_tokenizer(self.config)
        self._temperature = self.config.rollout.temperature if temperature is None else temperature
        self._seed = seed
        self._rows = BatchRows(self.config.rollout.batch_size)
        self._student = load_student(
            self.config, self._runtime, vocab_size=self._pair.vocab_size, base_path=run_dir.student_base_path
        )
        load_adapter(self._student, adapter)
        self._teacher: LanguageModel | None = None
        self._encoder = make_encoder(self.config, self._pair)
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
                "--show-writers out."
            )
        settings = self.config.rollout
        threshold = threshold_of_run(settings, self._threshold_path) if settings.policy == "switch" else None
        return make_policy(settings, threshold)

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation leaves the response all the tokens that it may have."""
        return len(self._encode(0, messages)) + self._limit <= self.context_tokens

    def answer(
        self, conversations: Sequence[Sequence[Message]], policy: Policy, *, first_id: int = 0
    ) -> list[Generation]:
        """One response to each conversation; the i-th draws the noise of example `first_id` + i.

        A response that would pass the end of the context is cut there, which is said once.

        Raises:
            DataError: the run's template refuses a conversation.
            ConfigError: a conversation fills the context of the models.
        """
        requests, cut = [], 0
        for i, messages in enumerate(conversations):
            ids = self._encode(i, messages)
            room = min(self._limit, self.context_tokens - len(ids))
            if room < 1:
                raise ConfigError(
                    f"Prompt {first_id + i + 1} has {len(ids)} tokens, and the context of the models is "
                    f"{self.context_tokens}. Shorten it."
                )
            cut += room < self._limit
            requests.append(RolloutRequest(first_id + i, 0, ids, room))
        if cut:
            logger.warning(
                "%d of %d responses may be cut at the end of the context of %d tokens.",
                cut,
                len(requests),
                self.context_tokens,
            )
        if policy.uses_teacher and self._teacher is None:
            self._teacher = load_teacher(self.config.teacher, self._runtime, vocab_size=self._pair.vocab_size)
        write = partial(
            rollout,
            requests,
            teacher=self._teacher if policy.uses_teacher else None,
            student=self._student if policy.uses_student else None,
            policy=policy,
            seed=self._seed,
            temperature=self._temperature,
            eos_ids=self._pair.eos_ids,
            pad_id=self._pair.pad_id,
            keep="nothing",
        )
        written, _ = self._rows.attempt(self.device, write)
        return [
            Generation(
                prompt=messages[-1].content,
                text=self._pair.tokenizer.decode(one.response_ids, skip_special_tokens=True),
                tokens=written_tokens(one, self._pair.tokenizer),
            )
            for messages, one in zip(conversations, written, strict=True)
        ]

    def _encode(self, number: int, messages: Sequence[Message]) -> list[int]:
        prompt = self.config.data.system_prompt
        turns = (Message("system", prompt),) if prompt and (not messages or messages[0].role != "system") else ()
        record = Record(id=number, messages=(*turns, *messages), response=None, source=f"prompt {number + 1}")
        return self._encoder.encode(record).prompt_ids


def generate_from_run(
    run_path: Path,
    asked: Sequence[str] | Sequence[Sequence[Message]],
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
    conversations = [[Message("user", one)] if isinstance(one, str) else one for one in asked]
    return answerer.answer(conversations, answerer.run_policy if show_writers else StudentPolicy())


def read_conversations(path: Path) -> list[tuple[Message, ...]]:
    """What to ask: each line of a text file, or each record of a data file, whatever `data.train` may be.

    Raises:
        DataError: the file cannot be read as records.
        ConfigError: there is no such file, or no line in it.
    """
    if not path.is_file():
        raise ConfigError(f"--prompts {path}: there is no such file.")
    if path.suffix != ".txt":
        return [record.messages for record in load_records(DataSection(train=str(path)), str(path))]
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    found: list[tuple[Message, ...]] = [(Message("user", line),) for line in lines if line]
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

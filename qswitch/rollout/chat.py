"""A conversation with the student of a run, and what its teacher would say.

Knows nothing of how answers are made (`generate.py`) or how they are shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from qswitch.data.turns import Message
from qswitch.errors import QSwitchError, is_out_of_memory
from qswitch.models.host_memory import release_memory
from qswitch.models.messages import first_line
from qswitch.rollout.generate import Answerer, Generation
from qswitch.rollout.policy import Policy, StudentPolicy, TeacherPolicy

HELP = """\
/teacher   the teacher's answer to the same question (it does not enter the conversation)
/writers   colour the answers by writer: the run's policy writes, teacher included; again to stop
/again     another answer to the same question
/new       forget the conversation
/help      this list
/quit      end; so does Ctrl-D"""


class Chat:
    """A conversation: what was said, and the noise of the next answer.

    Args:
        run_path: run directory, finished or with a checkpoint.
        max_new_tokens, temperature, seed: as `Answerer` takes them.
        show_writers: start as after /writers.
        say: shows a remark.
        show: shows an answer, coloured by writer or not.
        read: asks for the next line with a mark before it; raises EOFError at the end.
    """

    def __init__(
        self,
        run_path: Path,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        show_writers: bool = False,
        say: Callable[[str], None],
        show: Callable[[Generation, bool], None],
        read: Callable[[str], str],
    ) -> None:
        self._answerer = Answerer(run_path, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        self._messages: list[Message] = []
        self._show_writers = show_writers
        self._say, self._show, self._read = say, show, read
        self._num_answers = 0

    def converse(self) -> None:
        """Read lines and answer them until the end."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (importing it gives `input` a history and line editing)
        self._say("Ask something. /teacher shows the teacher's answer, /help lists the rest.")
        while True:
            try:
                line = self._read("> ").strip()
            except EOFError:
                self._say("")
                return
            if line == "/quit":
                return
            try:
                self._take(line)
            except KeyboardInterrupt:
                self._say("(stopped)")
            except QSwitchError as error:  # this question cannot be answered; the next may be
                self._say(str(error))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._say(f"(out of memory: {first_line(error)}; /new or a shorter question takes less)")
            else:
                continue
            release_memory(self._answerer.device)  # outside the handlers the traceback is gone, and what it held

    def _take(self, line: str) -> None:
        if not line:
            return
        if line == "/help":
            self._say(HELP)
        elif line == "/new":
            self._messages = []
            self._say("(a new conversation)")
        elif line == "/writers":
            self._show_writers = not self._show_writers
            self._say("(coloured by writer)" if self._show_writers else "(the student alone)")
        elif line in ("/teacher", "/again"):
            if not self._messages:
                self._say("Ask something first.")
            elif line == "/teacher":
                self._say("[teacher]")
                self._show(self._answer(self._messages[:-1], TeacherPolicy()), False)
            else:
                self._reply(self._messages[:-1])
        elif line.startswith("/"):
            self._say(f"There is no {line.split()[0]}. /help lists what there is.")
        else:
            self._reply([*self._messages, Message("user", line)])

    def _reply(self, messages: list[Message]) -> None:
        """Answer the last message; a question that fails or is stopped is not part of the conversation."""
        policy = self._answerer.run_policy if self._show_writers else StudentPolicy()
        messages = self._fitting(messages)
        generation = self._answer(messages, policy)
        self._messages = [*messages, Message("assistant", generation.text)]
        self._show(generation, self._show_writers)

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """The conversation without its oldest turns, where the context has no place for them."""
        kept = messages
        while len(kept) > 2 and not self._answerer.fits(kept):
            kept = kept[2:]
        if len(kept) < len(messages):
            self._say(f"(forgot the oldest {(len(messages) - len(kept)) // 2} turns: the context is full)")
        return kept

    def _answer(self, messages: list[Message], policy: Policy) -> Generation:
        # Each answer draws its own noise, else /again would say the same.
        record = self._answerer.as_record(0, messages)
        [generation] = self._answerer.answer([record], policy, first_id=self._num_answers)
        self._num_answers += 1
        return generation

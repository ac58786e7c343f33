"""How long a pass of each model takes here: the table from which the block length is chosen, measured once a run.

Letters: `R` rows, `n` tokens of a pass, `V` shared vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from qswitch.divergence import jsd_bits_from_log_probs
from qswitch.models.language_model import LanguageModel
from qswitch.rollout import noise
from qswitch.rollout.block_length import MAX_BLOCK_TOKENS, PassTimes, drafts_within_scratch
from qswitch.rollout.decode import inference
from qswitch.rollout.engine import log_probs
from qswitch.rollout.kv_cache import KVState, Prompts
from qswitch.rollout.step_graph import EAGER_PASSES, StepGraphs
from qswitch.rollout.transfer import to_device

CONTEXT_TOKENS = 16
"""Tokens that each row has read before the timed pass; a longer past hardly changes a pass of a model that fits."""
_BLOCKS = (1, 2, 3, 5, 9, MAX_BLOCK_TOKENS + 1)
LIMIT_S = 60.0
"""Seconds after which nothing more is measured than a table needs: a machine that is that slow is busy."""


def measure_pass_times(
    teacher: LanguageModel,
    student: LanguageModel,
    batch_size: int,
    *,
    repeats: int = 3,
    limit_s: float = LIMIT_S,
    teacher_graphs: bool = False,
    student_graphs: bool = False,
) -> PassTimes:
    """Time passes of 1 and of `batch_size` rows: the least of `repeats`, since other work only ever adds time.

    Blocks are measured up to the first at which a pass costs as much as its tokens one by one; from there on longer
    ones cannot pay, and the table's last slope stands for them. After `limit_s` seconds only what a table needs is
    measured: the largest number of rows, two blocks, one pass each. With graphs a model's passes are replayed, as they
    will be in the rollouts.
    """
    rows = tuple(sorted({1, max(batch_size // 4, 1), batch_size}))
    measured: list[int] = []
    by_rows, student_seconds = [], []
    deadline = time.perf_counter() + limit_s
    # No longer than a round's scratch allows, but the two blocks that a table needs.
    longest = max(drafts_within_scratch(batch_size, student.vocab_size), 1) + 1
    blocks = [n for n in _BLOCKS if n <= longest]
    with inference(teacher, student):
        for num_rows in reversed(rows):
            if measured and time.perf_counter() > deadline:
                break
            measured.append(num_rows)
            probe = _Probe(student, num_rows, repeats, StepGraphs(student) if student_graphs else None)
            student_seconds.append(probe.least(probe.student_pass, deadline))
            probe = _Probe(teacher, num_rows, repeats, StepGraphs(teacher) if teacher_graphs else None)
            seconds: list[float] = []
            for n in blocks:
                seconds.append(probe.least(partial(probe.teacher_pass, n), deadline))
                if n > 1 and (seconds[-1] >= n * seconds[0] or time.perf_counter() > deadline):
                    break
            if num_rows == rows[-1]:
                blocks = blocks[: max(len(seconds), 2)]
            # Fewer rows may stop earlier; the table is a rectangle, so the same price per token goes on.
            while len(seconds) < len(blocks):
                seconds.append(seconds[-1] * blocks[len(seconds)] / blocks[len(seconds) - 1])
            by_rows.append(tuple(seconds))
    return PassTimes(
        rows=tuple(reversed(measured)),
        tokens=tuple(blocks),
        teacher=tuple(reversed(by_rows)),
        student=tuple(reversed(student_seconds)),
        device=str(teacher.device),
    )


class _Probe:
    """One model that has read a few tokens in each of R rows."""

    def __init__(self, model: LanguageModel, num_rows: int, repeats: int, graphs: StepGraphs | None = None) -> None:
        self.model, self.device, self.num_rows, self.repeats = model, model.device, num_rows, repeats
        self.state = KVState(model, num_rows, CONTEXT_TOKENS + _BLOCKS[-1], graphs=graphs)
        if self.state.is_recurrent:  # what stands of a block stays, so that it has to be read again
            self.state = KVState(model, num_rows, CONTEXT_TOKENS + (repeats + 1) * sum(_BLOCKS))
        self.state.repack(np.arange(0), Prompts(*self._tokens(CONTEXT_TOKENS)))

    def _tokens(self, n: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        tokens = torch.arange(self.num_rows * n, device=self.device).view(self.num_rows, n) % self.model.vocab_size
        return tokens, torch.ones_like(tokens, dtype=torch.bool), np.full(self.num_rows, n)

    def _read(self, n: int) -> torch.Tensor:
        self.state.begin_block(n)
        return self.state.append(*self._tokens(n))

    def _take_back(self, n: int) -> None:
        """As a round does: rows differ in how much of a block stands, and a recurrent model reads that again."""
        counts = (
            1 + np.arange(self.num_rows) % n if self.state.is_recurrent else np.zeros(self.num_rows, dtype=np.int64)
        )
        self.state.take_back(n, to_device(counts, self.device), counts, np.full(self.num_rows, n))

    def student_pass(self) -> None:
        distribution = log_probs(self.model, self._read(1))
        noise.draw(distribution, self._noise(1), 1.0)
        self._take_back(1)

    def teacher_pass(self, n: int) -> None:
        distribution = log_probs(self.model, self._read(n))
        jsd_bits_from_log_probs(distribution, distribution)
        noise.draw(distribution, distribution, 1.0)  # the noise is already there from the drafts
        self._take_back(n)

    def _noise(self, n: int) -> torch.Tensor:
        keys = torch.arange(self.num_rows * n, device=self.device)
        return noise.gumbel(keys, self.model.vocab_size).view(self.num_rows, n, -1)

    def least(self, run: Callable[[], None], deadline: float) -> float:
        """Fewest seconds of a pass; the first ones of a shape set things up, or record it."""
        for _ in range(1 + (EAGER_PASSES if self.state.replays else 0)):
            run()
        best = float("inf")
        for _ in range(self.repeats):
            started = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            finished = time.perf_counter()
            best = min(best, finished - started)
            if finished > deadline:
                break
        return best

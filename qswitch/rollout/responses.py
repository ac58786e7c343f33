"""What the rows have written so far: it stays on the device until a row ends, then goes to the host by itself.

Every row owns a place. Column 0 of a place is the prompt's last token, column t + 1 is response step t, and the last
column is a bin: it takes what a round computed beyond the tokens that stand, so that one indexed write serves all rows.
Knows no model, no policy and no noise.

Letters: `B` places, `R` rows, `J` steps of a block, `T` longest response, `D` teacher width, `D'` student width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qswitch.rollout.policy import STUDENT, TEACHER, Decision
from qswitch.rollout.requests import Keep, Rollout, RolloutRequest
from qswitch.rollout.transfer import to_device, to_host

NOT_ASKED = -1
"""In place of a token id: the model was not asked at this step."""


class Responses:
    """Tokens, writers, divergences, thresholds and kept states of up to `num_places` rows of `longest` steps."""

    def __init__(self, num_places: int, longest: int, device: torch.device, *, keep: Keep, keep_student: bool) -> None:
        shape = (num_places, longest + 2)
        self._bin = longest + 1
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._writers = torch.zeros(shape, dtype=torch.int8, device=device)
        self._by_student = torch.full(shape, NOT_ASKED, dtype=torch.int64, device=device)
        self._by_teacher = torch.full(shape, NOT_ASKED, dtype=torch.int64, device=device)
        self._jsd = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self._threshold = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self._keep, self._keep_student = keep, keep_student
        self._teacher_hidden: Tensor | None = None  # (B, T + 2, D), made when the first states come
        self._student_hidden: Tensor | None = None  # (B, T + 2, D')

    def open(self, places: Tensor, last_prompt_tokens: Tensor) -> None:
        """Begin anew at `places`, after the prompts' last tokens: int64 [R], [R]."""
        self._tokens[places, 0] = last_prompt_tokens
        self._writers[places, 0] = STUDENT
        self._by_student[places] = self._by_teacher[places] = NOT_ASKED
        self._jsd[places] = torch.nan
        self._threshold[places] = torch.nan

    def last_tokens(self, places: Tensor, steps: Tensor) -> Tensor:
        """The token before each row's next step: int64 [R], [R] -> [R]."""
        return self._tokens[places, steps]

    def past_jsd(self, places: Tensor, steps: Tensor, window: int) -> Tensor:
        """Divergences of the `window` steps before each row's next one, NaN where there were none: float64 [R, W]."""
        before = steps[:, None] + torch.arange(1 - window, 1, device=steps.device)
        return self._jsd[places[:, None], before.clamp_min(0)]  # column 0 is NaN

    def handed_over(self, places: Tensor, steps: Tensor) -> Tensor:
        """Whether the teacher wrote the step before each row's next one: bool [R]."""
        return self._writers[places, steps] == TEACHER

    def write(
        self,
        places: Tensor,
        steps: Tensor,
        num_written: Tensor,
        tokens: Tensor,
        decision: Decision,
        *,
        by_student: Tensor | None,
        by_teacher: Tensor | None,
        unasked: Tensor | None,
        teacher_hidden: Tensor | None,
        student_hidden: Tensor | None,
    ) -> None:
        """Write the first `num_written` [R] of each row's block: steps and tokens [R, J], states [R, J, D].

        `by_student` and `by_teacher` [R, J] are what each model would have written. `unasked` bool [R, 1] marks rows
        whose divergence and student token mean nothing, because the student no longer follows them.
        """
        num_steps = tokens.shape[1]
        rows = places[:, None]
        stands = torch.arange(num_steps, device=tokens.device) < num_written[:, None]
        columns = torch.where(stands, steps + 1, self._bin)
        self._tokens[rows, columns] = tokens
        self._writers[rows, columns] = decision.writers
        if by_student is not None:
            asked = by_student if unasked is None else by_student.masked_fill(unasked, NOT_ASKED)
            self._by_student[rows, columns] = asked
        if by_teacher is not None:
            self._by_teacher[rows, columns] = by_teacher
        if decision.jsd_bits is not None:
            jsd = decision.jsd_bits.double()
            self._jsd[rows, columns] = jsd if unasked is None else jsd.masked_fill(unasked, torch.nan)
        if decision.threshold is not None:
            self._threshold[rows, columns] = decision.threshold
        if self._keep != "nothing" and teacher_hidden is not None:
            if self._teacher_hidden is None:
                self._teacher_hidden = teacher_hidden.new_empty((*self._tokens.shape, teacher_hidden.shape[-1]))
            self._teacher_hidden[rows, columns] = teacher_hidden
        if self._keep_student and student_hidden is not None:
            if self._student_hidden is None:
                self._student_hidden = student_hidden.new_zeros((*self._tokens.shape, student_hidden.shape[-1]))
            self._student_hidden[rows, columns] = student_hidden

    def send(self, place: int, length: int, *, request: int, ended: bool) -> Landing:
        """Send the `length` tokens of a place on their way to the host."""
        span = slice(1, length + 1)
        kinds = (self._tokens, self._writers, self._by_student, self._by_teacher)
        whole = torch.stack([kind[place, span].double() for kind in kinds])
        real = torch.stack([self._jsd[place, span], self._threshold[place, span]])
        hidden = self._teacher_hidden[place, span].clone() if self._teacher_hidden is not None else None
        states = self._student_hidden[place, span].clone() if self._student_hidden is not None else None
        return Landing(request, ended, to_host(torch.cat([whole, real])), hidden, states, self._keep)


@dataclass(frozen=True, slots=True)
class Landing:
    """A finished row on its way to the host."""

    request: int
    """Index of its request."""
    ended: bool
    values: Tensor
    """float64 [6, T]: token, writer, the student's and the teacher's token, divergence, threshold; float64 holds every
    token id exactly."""
    hidden: Tensor | None
    """[T, D] states of the teacher, where some are to be kept."""
    student_hidden: Tensor | None
    """[T, D'] states of the student, where they are to be kept."""
    keep: Keep

    def rollout(self, request: RolloutRequest) -> Rollout:
        """The finished row, once its copy has arrived."""
        tokens, writers, by_student, by_teacher = self.values[:4].long().tolist()
        jsd, thresholds = (
            None if bool(series.isnan().all()) else [None if v != v else v for v in series.tolist()]
            for series in self.values[4:]
        )
        kept, hidden = [], None
        if self.hidden is not None:
            kept = [t for t, writer in enumerate(writers) if self.keep == "all" or writer == TEACHER]
            hidden = self.hidden[to_device(kept, self.hidden.device)]
        return Rollout(
            example_id=request.example_id,
            visit=request.visit,
            prompt_ids=request.prompt_ids,
            response_ids=tokens,
            writers=writers,
            jsd_bits=jsd,
            thresholds=thresholds,
            kept_steps=kept,
            teacher_hidden=hidden,
            ended=self.ended,
            student_hidden=self.student_hidden,
            student_ids=_asked(by_student),
            teacher_ids=_asked(by_teacher),
        )


def _asked(tokens: list[int]) -> list[int | None] | None:
    return None if all(t == NOT_ASKED for t in tokens) else [None if t == NOT_ASKED else t for t in tokens]

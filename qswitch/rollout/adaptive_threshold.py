"""What moves the threshold of SWITCH from one set of rollouts to the next, and what of it is known only in a run.

A set of rollouts is what is written at once, for one optimizer step or for several (rollout.steps_at_once).

A run knows how long responses are expected to be (schedule `relative`) once the teacher has answered the held-out
prompts, and it holds a wanted share of teacher tokens (`rollout.teacher_share`). The state changes between sets only,
by counts and divergences that no batch size or order changes, so a rollout stays a function of weights, key and the
state at the start of its set. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qswitch.config import RolloutSection
from qswitch.outside import read_json
from qswitch.rollout.policy import TEACHER
from qswitch.rollout.requests import Rollout
from qswitch.rollout.threshold import TAU_FLOOR_BITS, Threshold, make_threshold
from qswitch.state_files import ThresholdFile

GAIN = 2.0
"""How far the logarithm of the factor moves for an error of 1 in the share of a set of mean size. The share changes by
0.2 or so for each unit of the logarithm, so a set takes away about two fifths of an error, without ringing."""
MAX_LOG_FACTOR = math.log(1e4)
"""The factor stays within 1e-4 and 1e4, where nearly all tokens are one writer's."""


class AdaptiveThreshold:
    """The threshold of the next set of rollouts, and what is known from the sets before.

    With a wanted share w of teacher tokens, the threshold falls `factor` times as fast as written. The first set that
    is observed sets the factor to the one with which w of its tokens would have been the teacher's, had they stayed as
    they were. Every later set moves its logarithm by GAIN * (w * tokens - teacher tokens) / mean tokens of a set.
    As the logarithm stays bounded, so does the sum of these errors: the share of all tokens tends to w, whatever the
    models become.
    """

    def __init__(self, rollout: RolloutSection) -> None:
        self._settings = rollout
        self.expected_tokens: float | None = None
        """Mean length of the teacher's answers to the held-out prompts; None until it is known, or not needed."""
        self.log_factor = 0.0
        self.sets = self.tokens = self.teacher_tokens = 0

    @staticmethod
    def is_needed(rollout: RolloutSection) -> bool:
        """Whether anything of the threshold is known only once a run has begun."""
        relative = rollout.schedule == "relative" and rollout.expected_tokens == "auto"
        return rollout.policy == "switch" and (relative or rollout.teacher_share is not None)

    @property
    def factor(self) -> float:
        """How many times as fast the threshold falls as written."""
        return math.exp(self.log_factor)

    @property
    def threshold(self) -> Threshold:
        """Of the next set."""
        return make_threshold(self._settings, expected_tokens=self.expected_tokens, factor=self.factor)

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Hear of a finished set; the order of its rollouts changes nothing."""
        wanted = self._settings.teacher_share
        writers = [writer for one in rollouts for writer in one.writers]
        if wanted is None or not writers:
            return
        by_teacher = sum(writer == TEACHER for writer in writers)
        self.sets, self.tokens = self.sets + 1, self.tokens + len(writers)
        self.teacher_tokens += by_teacher
        if self.sets == 1:
            log_factor = self._log_factor_for(wanted, rollouts)
        else:
            log_factor = self.log_factor + GAIN * (wanted * len(writers) - by_teacher) * self.sets / self.tokens
        self.log_factor = min(max(log_factor, -MAX_LOG_FACTOR), MAX_LOG_FACTOR)

    def _log_factor_for(self, wanted: float, rollouts: Sequence[Rollout]) -> float:
        """The logarithm of the factor at which `wanted` of these tokens would have been the teacher's."""
        written = make_threshold(self._settings, expected_tokens=self.expected_tokens)
        tokens = [token for one in rollouts for token in enumerate(one.jsd_bits or [None] * len(one.writers))]
        known = [jsd for _, jsd in tokens if jsd is not None]
        # In the tail nobody asked for the divergence; the mean of the others stands for it.
        usual = math.fsum(known) / len(known) if known else TAU_FLOOR_BITS
        factors = sorted(written.critical_factor(step, usual if jsd is None else jsd) for step, jsd in tokens)
        at = min(max(round(wanted * len(factors)), 1), len(factors) - 1) if len(factors) > 1 else 0
        least, most = math.exp(-MAX_LOG_FACTOR), math.exp(MAX_LOG_FACTOR)
        low, high = (math.log(min(max(f, least), most)) for f in (factors[max(at - 1, 0)], factors[at]))
        return (low + high) / 2

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        names = ("expected_tokens", "log_factor", "sets", "tokens", "teacher_tokens")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name in self.state_dict():
            setattr(self, name, state[name])


def threshold_of_run(rollout: RolloutSection, path: Path | None) -> Threshold:
    """The threshold with which a run would write next, by its threshold.json; without one, the configuration's.

    Raises:
        ConfigError: as `make_threshold`.
        FileError: the file is not what belongs there.
    """
    if path is None or not path.is_file():
        return make_threshold(rollout)
    adaptive = AdaptiveThreshold(rollout)
    adaptive.load_state_dict(dict(read_json(path, ThresholdFile)))
    return adaptive.threshold

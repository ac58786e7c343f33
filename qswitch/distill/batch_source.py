"""Where the next batch's responses come from: the data, a fresh rollout, or an earlier one.

A step's coin is a function of the run's seed and the step, so a resumed run draws the same sources. Knows no models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Source = Literal["ground_truth", "rollout", "replay"]

PHI_STEP = 0.1
"""By which the share of student-written batches grows (DistiLLM's code)."""


@dataclass(slots=True)
class AdaptiveShare:
    """The share phi of student-written batches, which grows when the validation loss rises (DistiLLM, Ko et al. 2024).

    phi starts at 0. A validation whose loss exceeds the last reference by `tolerance_nats` or more adds 0.1 and becomes
    the reference; the first one is the reference to begin with.
    """

    tolerance_nats: float
    phi: float = 0.0
    reference_nats: float | None = None

    def observe(self, loss_nats: float) -> bool:
        """Hear of a validation; whether phi grew."""
        if self.reference_nats is None:
            self.reference_nats = loss_nats
            return False
        if loss_nats < self.reference_nats + self.tolerance_nats:
            return False
        self.reference_nats = loss_nats
        before, self.phi = self.phi, min(1.0, round(self.phi + PHI_STEP, 6))
        return self.phi > before

    def source(self, coin: float, progress: float, *, can_replay: bool) -> Source:
        """Of a step with `coin` in [0, 1) at `progress` in [0, 1): fresh below phi (1 - progress), replayed up to phi.

        Where nothing can be replayed the rollout is fresh.
        """
        if coin >= self.phi:
            return "ground_truth"
        return "replay" if can_replay and coin >= self.phi * (1 - progress) else "rollout"

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.reference_nats = state["phi"], state["reference_nats"]

"""Loss scaling: what keeps the small gradients of fp16 arithmetic from becoming zero.

Knows no model and no step. The scale is a power of two, so that a gradient which neither overflows nor underflows is
the unscaled one bit for bit. It is torch's `GradScaler` that halves it after an overflow and doubles it after 2,000
steps without one; the loss is scaled before its gradient is taken chunk by chunk (`loss.py`), which is earlier than
that class would do it.
"""

from __future__ import annotations

from typing import Any

import torch

SMALLEST_SCALE = 1.0
"""Below it scaling makes gradients smaller than they are: what is not finite then is not for want of range."""


class LossScale:
    """The scale of a run that computes in fp16; always 1 in other arithmetic, whose exponents are those of fp32."""

    def __init__(self, device: torch.device, compute_dtype: torch.dtype) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
        self._device = device

    @property
    def value(self) -> float:
        """By which the next loss is multiplied."""
        return float(self._scaler.get_scale())

    @property
    def used(self) -> bool:
        """Whether this run scales at all."""
        return bool(self._scaler.is_enabled())

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, in place."""
        if self.used:
            self._scaler.scale(torch.ones((), device=self._device))  # lets torch put the scale on the device
            self._scaler.unscale_(optimizer)

    def overflowed(self) -> bool:
        """After gradients that are not finite: halve the scale; False where it is not the scale that is at fault."""
        before = self.value
        if not self.used or before / 2 < SMALLEST_SCALE:
            return False
        self._scaler.update()
        return self.value < before

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer with unscaled gradients that are finite."""
        self._scaler.step(optimizer)  # the optimizer's own where nothing is scaled
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scale and the steps since it last changed; empty where nothing is scaled."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; a run that goes on in other arithmetic begins with a scale of its own, or none."""
        if self.used and state:
            self._scaler.load_state_dict(state)

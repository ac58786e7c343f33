"""Does a loaded model decode rows of different length together as it decodes each alone? Proved before a run begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qswitch.errors import ModelError
from qswitch.models.language_model import LanguageModel
from qswitch.rollout.kv_cache import KVState, Prompts


@torch.no_grad()
def verify_kv(model: LanguageModel, *, blocks: bool) -> None:
    """Prove on a probe that rows of different length can share a batch and, with `blocks`, take back what they read.

    Raises:
        ModelError: the states differ from plain passes over each row; says what to do instead.
    """
    training = model.training
    model.eval()
    try:
        difference = _probe(model, blocks)
    finally:
        model.train(training)
    tolerance = 5e-2 if model.compute_dtype in (torch.bfloat16, torch.float16) else 1e-4
    if difference <= tolerance:
        return
    name = type(model.causal_model).__name__
    if blocks:
        raise ModelError(
            f"{name} cannot take back tokens it has read (its states differ by {difference:.3g} of their size on a "
            "probe), so drafts cannot be tried on it. Set rollout.block_tokens=0, the sequential engine."
        )
    raise ModelError(
        f"{name} does not give the rows of a left-padded batch the states that it gives them alone (they differ by "
        f"{difference:.3g} of their size on a probe), so batched rollouts would be wrong. Use another model family."
    )


def _probe(model: LanguageModel, blocks: bool) -> float:
    """Largest difference of the last states of two rows from plain passes, relative to their size."""
    device = model.device
    texts = [[1, 2, 3, 4, 5, 6], [7, 5, 3, 2]]
    texts = [[i % model.vocab_size for i in text] for text in texts]
    state = KVState(model, 2, 16)

    def read(block: list[list[int | None]]) -> tuple[Tensor, Tensor, np.ndarray]:
        ids = torch.tensor([[i or 0 for i in row] for row in block], device=device)
        live = torch.tensor([[i is not None for i in row] for row in block], device=device)
        return ids, live, live.sum(dim=1).cpu().numpy()

    state.repack(np.arange(0), Prompts(*read([[*texts[0][:3]], [None, *texts[1][:2]]])))
    if blocks:
        # Row 0 keeps two of three drafts, row 1 none of them but the first token.
        state.begin_block(3)
        state.append(*read([[texts[0][3], texts[0][4], 0], [texts[1][2], 0, 0]]))
        state.take_back(3, torch.tensor([2, 1], device=device), np.array([2, 1]), np.array([3, 3]))
    else:
        state.append(*read([[texts[0][3]], [texts[1][2]]]))
        state.append(*read([[texts[0][4]], [None]]))
    last = state.append(*read([[texts[0][5]], [texts[1][3]]]))[:, -1].double()
    worst = 0.0
    for row, text in enumerate(texts):
        ids = torch.tensor([text], device=device)
        alone = model.hidden(
            ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(len(text), device=device)[None]
        )[0, -1].double()
        worst = max(worst, ((last[row] - alone).norm() / alone.norm().clamp_min(1e-12)).item())
    return worst if np.isfinite(worst) else float("inf")

"""Recurrent and convolution layers: states join and leave with their rows, and a rejected draft leaves no trace.

The layers of these models compute in float32 whatever their weights are, so states agree to its rounding, not exactly.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qswitch.models.language_model import LanguageModel
from qswitch.rollout.cache_layers import recurrent_states
from qswitch.rollout.graph_trial import try_graphs
from qswitch.rollout.kv_cache import KVState
from qswitch.rollout.kv_probe import verify_kv
from qswitch.rollout.pass_times import measure_pass_times
from tests.rollout.test_engines import POLICIES, Whimsical, draw_requests, make_pair, oracle, same, write
from tests.rollout.test_kv_cache import join, plain, read
from tests.tiny import tiny_model

HYBRIDS = ("qwen3_5_text", "lfm2", "falcon_h1", "granitemoehybrid")


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[LanguageModel, LanguageModel]]:
    return {arch: make_pair(arch) for arch in HYBRIDS}


@pytest.mark.parametrize("arch", HYBRIDS)
def test_the_engine_writes_what_plain_passes_would(pairs, arch):
    rng = random.Random(arch)
    for name in ("switch", "teacher", "adaswitch", "skd"):
        requests = draw_requests(rng, 3)
        written, _ = write(pairs[arch], POLICIES[name], requests, batch_size=2, drafts=rng.choice([0, 2, 5]))
        for request, result in zip(requests, written, strict=True):
            assert (result.response_ids, result.writers) == oracle(pairs[arch], name, request)[:2], (name, request)


@pytest.mark.parametrize("arch", HYBRIDS)
def test_blocks_batches_and_refills_write_the_same_tokens(pairs, arch):
    """Block = sequential; a batch of 8 = 8 batches of 1; with padding, refills and teacher-only rounds."""
    rng = random.Random(f"hybrids {arch}")
    for name in ("switch", "switch with a tail", "student", "mixture"):
        requests = draw_requests(rng, 8)
        alone, _ = write(pairs[arch], POLICIES[name], requests)
        for batch_size, drafts in ((8, 0), (1, 4), (8, 3), (3, 6)):
            written, _ = write(pairs[arch], POLICIES[name], requests, batch_size=batch_size, drafts=drafts)
            assert all(same(a, b) for a, b in zip(alone, written, strict=True)), (name, batch_size, drafts)
        written, _ = write(pairs[arch], POLICIES[name], requests, batch_size=4, blocks=Whimsical(7))
        assert all(same(a, b) for a, b in zip(alone, written, strict=True)), name


@pytest.mark.parametrize("arch", HYBRIDS)
def test_a_rejected_draft_leaves_no_trace_in_the_states(arch):
    """After a block of which rows keep none, some or all, every state is that of a row that never read the rest."""
    model = LanguageModel(tiny_model(arch, dtype=torch.float64))
    state = KVState(model, 4, 64)
    texts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    join(state, [[None, 5, 6, 7], [None, None, None, 8], [None, None, 9, 10], [11, 12, 13, 14]])
    block = [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31], [32, 33, 34, 35]]
    kept = np.array([1, 4, 0, 2])
    state.begin_block(4)
    read(state, block)
    state.take_back(4, torch.from_numpy(kept), kept, np.full(4, 4))
    assert state.num_rereads == 3, "one pass for each different number of tokens"
    texts = [text + row[:k] for text, row, k in zip(texts, block, kept, strict=True)]
    for row, text in enumerate(texts):
        alone = KVState(model, 1, 64)
        join(alone, [text])
        for ours, theirs in zip(recurrent_states(state._layers), recurrent_states(alone._layers), strict=True):
            assert ours is None or torch.allclose(ours[row], theirs[0], rtol=0, atol=1e-5), (row, ours.shape)
    join(state, [[40, 41]], kept=(3, 1))
    hidden = read(state, [[50], [51], [52]])
    for row, text in enumerate([[*texts[3], 50], [*texts[1], 51], [40, 41, 52]]):
        torch.testing.assert_close(hidden[row], plain(model, text), rtol=0, atol=1e-5)


def test_whole_blocks_and_none_of_them_need_no_second_reading():
    model = LanguageModel(tiny_model("lfm2", dtype=torch.float64))
    for kept in ([2, 2], [0, 2], [0, 0]):
        state = KVState(model, 2, 16)
        join(state, [[5, 6], [7, 8]])
        state.begin_block(2)
        read(state, [[20, 21], [22, 23]])
        state.take_back(2, torch.tensor(kept), np.array(kept), np.full(2, 2))
        assert state.num_rereads == 0
        hidden = read(state, [[30], [31]])
        for row, text in enumerate([[5, 6, *[20, 21][: kept[0]], 30], [7, 8, *[22, 23][: kept[1]], 31]]):
            torch.testing.assert_close(hidden[row], plain(model, text), rtol=0, atol=1e-5)


def test_probes_and_measurements_take_recurrent_models():
    model = LanguageModel(tiny_model("qwen3_5_text"))
    verify_kv(model, blocks=False)
    verify_kv(model, blocks=True)
    times = measure_pass_times(model, model, 2, repeats=1)
    assert all(seconds > 0 for row in times.teacher for seconds in row)
    trial = try_graphs(model, 2, record=lambda run: run)
    assert not trial.used and "recurrent" in trial.reason

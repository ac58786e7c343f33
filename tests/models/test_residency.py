"""A model that left frees its bytes, refuses passes, and comes back the same."""

from __future__ import annotations

import pytest
import torch

from qswitch import pinned
from qswitch.config import TeacherSection
from qswitch.models.language_model import LanguageModel
from qswitch.models.load import load_base
from qswitch.models.residency import SLAB_BYTES, SwappedModel, _own_storages, _tensors
from qswitch.models.runtime import Runtime
from qswitch.pinned import host_buffer
from qswitch.plan.memory import PINNED_SLAB_BYTES, pinned_bytes
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

IDS = torch.arange(24).reshape(2, 12) + 4
RUNTIME = Runtime(device=torch.device("cpu"), compute_dtype=torch.float32)


def live_bytes(model: LanguageModel) -> int:
    return sum(s.nbytes() for s in _own_storages(model.hf))


def frozen(arch: str) -> LanguageModel:
    return LanguageModel(tiny_model(arch).requires_grad_(False))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_bytes_are_gone_and_come_back(arch):
    model = frozen(arch)
    before, state = live_bytes(model), {n: t.clone() for n, t in model.hf.state_dict().items()}
    hidden = model.hidden(IDS)
    expected = model.logits(hidden)
    swapped = SwappedModel(model)
    assert torch.equal(model.logits(model.hidden(IDS)), expected)
    head = model.head.linear
    head_bytes = sum(t.numel() * t.element_size() for t in head.parameters())
    assert swapped.num_bytes == before - head_bytes == swapped.host_bytes
    for _ in range(2):
        swapped.leave()
        swapped.leave()
        assert not swapped.is_resident and live_bytes(model) == head_bytes
        assert torch.equal(model.logits(hidden), expected)  # the head stays
        for call in (lambda: model.hidden(IDS), lambda: model.hf(IDS)):
            with pytest.raises(AssertionError, match="off the device"):
                call()
        swapped.come_back()
        swapped.come_back()
        assert swapped.is_resident and live_bytes(model) == before
        assert torch.equal(model.logits(model.hidden(IDS)), expected)
    assert all(torch.equal(t, state[n]) for n, t in model.hf.state_dict().items())


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_a_loaded_teacher_leaves_with_its_scales(precision, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path / "teacher")
    # Not through load_teacher: LLM.int8 scales an activation by its whole batch, and its probe of causality says so.
    base = load_base(TeacherSection(model=str(folder), precision=precision), RUNTIME)
    model = LanguageModel(base, compute_dtype=RUNTIME.compute_dtype).requires_grad_(False).eval()
    with torch.no_grad():
        expected = model.logits(model.hidden(IDS))
        swapped = SwappedModel(model)
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in _tensors(model.hf))}
        head_bytes = sum(t.untyped_storage().nbytes() for t in model.head.linear.parameters())
        assert swapped.num_bytes == sum(storages.values()) - head_bytes
        swapped.leave()
        left = {id(t): t.untyped_storage().nbytes() for t in _tensors(model.hf)}
        assert sum(left.values()) == head_bytes
        swapped.come_back()
        assert torch.equal(model.logits(model.hidden(IDS)), expected)


def test_a_failed_return_leaves_the_model_away():
    swapped = SwappedModel(frozen("llama"))
    swapped.leave()
    size, swapped._sizes[-1] = swapped._sizes[-1], 2**60
    with pytest.raises(RuntimeError):
        swapped.come_back()
    assert not swapped.is_resident and all(s.nbytes() == 0 for s in swapped._storages)
    swapped._sizes[-1] = size
    swapped.come_back()
    assert swapped.is_resident


def test_the_copy_crosses_slabs(monkeypatch):
    monkeypatch.setattr("qswitch.models.residency.SLAB_BYTES", 1000)
    model = frozen("opt")
    expected = model.hidden(IDS)
    swapped = SwappedModel(model)
    assert len(swapped._slabs) == -(-swapped.num_bytes // 1000) > 100
    swapped.leave()
    swapped.come_back()
    assert torch.equal(model.hidden(IDS), expected)


def test_a_model_that_trains_is_refused():
    with pytest.raises(ValueError, match="frozen"):
        SwappedModel(LanguageModel(tiny_model("llama")))


def test_the_plan_counts_pinned_memory_as_torch_rounds_it():
    assert pinned_bytes(3 * SLAB_BYTES) == 3 * SLAB_BYTES
    assert pinned_bytes(SLAB_BYTES + 1) == SLAB_BYTES + 1
    assert PINNED_SLAB_BYTES == SLAB_BYTES
    assert pinned_bytes(SLAB_BYTES + 3 * 2**20) == SLAB_BYTES + 4 * 2**20
    assert pinned_bytes(0) == 0


def test_memory_that_cannot_be_pinned_is_pageable_and_said_once(monkeypatch, caplog):
    original = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(pinned, "_said", set())
    buffers = [host_buffer([3, 5], torch.float16, pinned=True) for _ in range(2)]
    assert [(b.shape, b.dtype) for b in buffers] == [(torch.Size([3, 5]), torch.float16)] * 2
    said = [r.message for r in caplog.records if "cannot be pinned" in r.message]
    assert len(said) == 1 and "CUDA error: out of memory" in said[0] and "ulimit -l" in said[0]

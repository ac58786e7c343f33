"""One function says what is out of memory; recovery, the command line and what users hear of loading ask it."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch

from qswitch.cli import run
from qswitch.distill.recovery import BatchRows, MemoryBudgetExceededError, MemoryFloorError, Recovery, Sizes
from qswitch.errors import ModelError, is_out_of_memory, storage_problem
from qswitch.models.messages import explained

OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryBudgetExceededError("the process holds 3.00 GiB of host memory, its budget is 2.00"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
NOT_OF_MEMORY = [
    RuntimeError("shape mismatch"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "model.safetensors"),
    MemoryFloorError("Out of memory in the loss stage, and nothing is left to shrink (CUDA out of memory. Tried)."),
]


def caused_by(error: BaseException) -> RuntimeError:
    outer = RuntimeError("a worker has failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("error", OF_MEMORY, ids=lambda error: str(error)[:40])
def test_what_is_out_of_memory_is_so_everywhere(error, monkeypatch, capsys):
    assert is_out_of_memory(error) and is_out_of_memory(caused_by(error))

    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    with pytest.raises(type(error)), explained("org/model", "model"):
        fail()
    monkeypatch.setattr("qswitch.cli.app", fail)
    assert run(["merge", "run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and ("qswitch doctor" in said) is ("NOT_INITIALIZED" in said)
    if isinstance(error, RuntimeError | MemoryError):
        rows, tried = BatchRows(4), []

        def write(batch_size: int) -> int:
            tried.append(batch_size)
            return fail() if batch_size > 1 else batch_size

        assert rows.attempt(torch.device("cpu"), write) == 1 and tried == [4, 2, 1]


@pytest.mark.parametrize("error", OF_MEMORY, ids=lambda error: str(error)[:40])
def test_the_one_error_with_another_cause_names_it(error):
    """Sizes shrink in vain where a driver does not fit; the message that ends the run must not blame memory alone."""
    recovery = Recovery(Sizes(rollout_rows=1, micro_batch=1, chunk_tokens=1, validation_rows=1), torch.device("cpu"))

    def fail() -> None:
        raise error

    with pytest.raises(MemoryFloorError) as caught:
        recovery.attempt("rollout", fail)
    assert ("qswitch doctor" in str(caught.value)) is ("NOT_INITIALIZED" in str(error))
    assert is_out_of_memory(error, surely=True) is ("NOT_INITIALIZED" not in str(error))


@pytest.mark.parametrize("error", NOT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_what_is_not_stays_what_it_is(error):
    assert not is_out_of_memory(error)


def test_an_error_with_a_remedy_of_its_own_is_not_asked_for_its_cause():
    error = ModelError("The teacher does not fit this GPU beside the student. Use --device cpu.")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert not is_out_of_memory(error)


def test_memory_that_the_system_refuses_for_a_file_is_named_with_the_file():
    error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "model.safetensors")
    assert storage_problem(error) == (
        f"model.safetensors: {os.strerror(errno.ENOMEM)}. Close other programs, or allow more memory."
    )

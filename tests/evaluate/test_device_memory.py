"""What `eval` and `fidelity` leave on a GPU: nothing while models come and go, and the same figures as on the CPU.

The card is that of `tests/pretended_cuda.py`; what lies on it is counted as each model begins to load. Commands without
a plan keep to what is free there.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

import qswitch.evaluate.fidelity as fidelity_module
from qswitch.evaluate import evaluate
from qswitch.evaluate.command import EvalRequest, run_eval
from qswitch.evaluate.own import held_bytes
from qswitch.evaluate.subjects import Subject
from qswitch.rollout.generate import Answerer
from qswitch.run_dir import RunDir
from tests.evaluate.runs import make_run, write_test_set
from tests.pretended_cuda import pretended_cuda

FREE = pytest.approx(11 / 12)
"""Share of the pretended card that is free."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> RunDir:
    return make_run(tmp_path_factory.mktemp("device"), rollout__max_new_tokens=8, rollout__batch_size=2)


def test_heads_wait_in_host_memory_one_per_model(made, tmp_path, monkeypatch):
    sets = [str(write_test_set(tmp_path / f"{name}.jsonl", count)) for name, count in (("few", 3), ("more", 4))]
    models = [str(made.path), f"base={made.path}:base"]

    def request(name: str, device: str) -> EvalRequest:
        return EvalRequest(
            models=models,
            data=sets,
            columns=[],
            seeds="10",
            max_new_tokens=5,
            device=device,
            output_dir=tmp_path / name,
        )

    expected, _ = run_eval(request("cpu", "cpu"), say=lambda _: None)
    found_before: list[int] = []
    heads: list[Any] = []
    load, read = Subject.load, evaluate.read_by_teacher

    def reads(teacher: Any, device: Any, waiting: Any, *rest: Any) -> None:
        heads.extend(one.view.head for one in waiting)
        hidden = sum(h.nbytes for one in waiting for h in one.view.hidden)
        weights = sum(p.nbytes for head in set(heads) for p in head.linear.parameters())
        assert held_bytes(waiting) == hidden + weights
        read(teacher, device, waiting, *rest)

    with pretended_cuda() as seen:

        def loads(subject: Subject, device: Any = None) -> Any:
            gc.collect()
            found_before.append(seen.held_bytes)
            loaded = load(subject, device)
            assert seen.held_bytes > 0
            return loaded

        monkeypatch.setattr(Subject, "load", loads)
        monkeypatch.setattr(evaluate, "read_by_teacher", reads)
        results, _ = run_eval(request("gpu", "cuda"), say=lambda _: None)
        assert {p.device.type for head in heads for p in head.linear.parameters()} == {"cpu"}
    assert found_before == [0, 0, 0, 0], "teacher, student, base, and the teacher to read them"
    assert len(heads) == 4 and len(set(heads)) == 2, "two sets of two models"
    assert seen.memory_fractions == 4 * [(FREE, 0)]
    assert results["sets"] == expected["sets"]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_fidelity_leaves_nothing_for_the_next_teacher_to_lie_beside(made, tmp_path, monkeypatch, num_gpus):
    config = made.config
    expected = measured(config, made, tmp_path, "cpu")
    teacher = config.teacher.model_copy(update={"num_gpus": num_gpus})
    found_before: list[int] = []
    load = fidelity_module._teacher
    with pretended_cuda(num_gpus) as seen:

        def loads(*arguments: Any) -> Any:
            gc.collect()
            found_before.append(seen.held_bytes)
            return load(*arguments)

        monkeypatch.setattr(fidelity_module, "_teacher", loads)
        found = measured(config.model_copy(update={"teacher": teacher}), made, tmp_path, "cuda")
    assert found_before == [0, 0]
    assert seen.memory_fractions == [(FREE, index) for index in range(num_gpus)]
    assert found == expected


def test_fidelity_goes_on_with_fewer_rows_when_memory_runs_out(made, tmp_path, monkeypatch):
    said: list[str] = []
    expected = measured(made.config, made, tmp_path, "cpu")
    for name in ("rollout", "score_responses"):
        whole = getattr(fidelity_module, name)

        def scarce(*arguments: Any, whole: Any = whole, batch_size: int, **options: Any) -> Any:
            if batch_size > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(*arguments, batch_size=batch_size, **options)

        monkeypatch.setattr(fidelity_module, name, scarce)
    found = measured(made.config, made, tmp_path, "cpu", say=said.append)
    assert [line for line in said if "out of memory" in line] == 2 * ["out of memory: 2 -> 1 rows at a time"]
    (one,), (other,) = expected["precisions"], found["precisions"]
    assert found["rollout_tokens"] == expected["rollout_tokens"]
    assert other["kl_nats"]["mean"] == pytest.approx(one["kl_nats"]["mean"], rel=1e-4)


def test_chat_and_generate_keep_to_what_is_free(tmp_path):
    run_dir = make_run(tmp_path, train__device="cuda")
    with pretended_cuda() as seen:
        Answerer(run_dir.path)
    assert seen.memory_fractions == [(FREE, 0)]


def measured(config: Any, run_dir: RunDir, folder: Path, device: str, say: Any = lambda _: None) -> dict[str, Any]:
    found = fidelity_module.fidelity(
        config, run_dir=run_dir, work_dir=folder, precisions=["nf4"], num_prompts=3, device=device, say=say
    )
    return {name: value for name, value in found.items() if name != "device"}

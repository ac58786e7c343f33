"""Out of memory at any allocation of any stage: the same tokens and the same adapter as a run that was small before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qswitch.config import RunConfig
from qswitch.distill import validation
from qswitch.distill.recovery import MemoryFloorError, Recovery, Sizes
from qswitch.distill.trainer import Trainer
from qswitch.models.host_memory import resident_bytes
from qswitch.models.load import load_teacher
from qswitch.models.pair import load_pair_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_student
from qswitch.run import resume
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders, load_prompts, settings  # noqa: F401
from tests.tiny import trainable_state

CPU = torch.device("cpu")


class FailAt(TorchDispatchMode):
    """Raises an out-of-memory error at the n-th operation that makes a new storage; 0 only counts."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.nth, self.count, self.fired = nth, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and id(t.untyped_storage()) not in given]
        if made and not self.fired:
            self.count += 1
            if self.count == self.nth:
                self.fired = True
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB (injected)")
        return result


class FailingRecovery(Recovery):
    """The real recovery, whose `stage` runs out of memory once, at the n-th allocation of its second call."""

    def __init__(self, config: RunConfig, stage: str, nth: int, call: int = 2) -> None:
        self.said: list[str] = []
        super().__init__(Sizes.of(config), CPU, planned_bytes=8, planned_bytes_of=lambda sizes: sizes.micro_batch,
                         say=self.said.append)  # fmt: skip
        # The teacher answers the held-out prompts before the first step.
        self._stage, self._nth, self._call = stage, nth, call + (stage == "rollout")
        self.count, self.calls = 0, 0

    def attempt(self, stage: str, run: Any, undo: Any = None) -> Any:
        if stage != self._stage:
            return super().attempt(stage, run, undo)
        self.calls += 1
        if self.calls != self._call:
            return super().attempt(stage, run, undo)
        mode = FailAt(self._nth)

        def watched() -> Any:
            if mode.fired:
                return run()
            try:
                with mode:
                    return run()
            finally:
                self.count = mode.count

        return super().attempt(stage, watched, undo)


def small(folders: Any, **changes: Any) -> RunConfig:  # noqa: F811
    return settings(folders, **{
        "train__compute_dtype": "fp64", "rollout__block_tokens": 2, "rollout__decay_rate": 0.5,
        "data__lm_corpus": str(folders[2].parent / "corpus.txt"), "loss__lm_passage_tokens": 16,
        "loss__chunk_tokens": 64, "train__max_steps": 2, "train__eval_own_prompts": 0, **changes,
    })  # fmt: skip


def run_trainer(config: RunConfig, path: Path, recovery: Recovery | None = None) -> Trainer:
    from qswitch.data.loader import load_corpus_tokens

    run_dir = RunDir.create(path, config)
    pair = load_pair_tokenizer(config)
    _, prompts, held_out = load_prompts(config, pair)
    runtime = make_runtime(config.train)
    trainer = Trainer(
        config, run_dir, teacher=load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size),
        student=load_student(config, runtime, vocab_size=pair.vocab_size, base_path=None), pair=pair, prompts=prompts,
        validation_prompts=held_out, corpus=load_corpus_tokens(config.data.lm_corpus, pair.tokenizer, split="train"),
        recovery=recovery,
    )  # fmt: skip
    trainer.run()
    return trainer


def outcome(trainer: Trainer) -> tuple[list[Any], dict[str, Tensor], list[float]]:
    tokens = [r["response_ids"] for r in trainer.run_dir.read_rollouts()]
    losses = [m["loss"] for m in trainer.run_dir.read_metrics() if "loss" in m]
    return tokens, trainable_state(trainer.student), losses


@pytest.fixture(scope="module")
def planned_small(folders, tmp_path_factory):  # noqa: F811
    config = small(folders, train__per_device_train_batch_size=1, train__gradient_accumulation_steps=4,
                   rollout__batch_size=2, loss__chunk_tokens=32)  # fmt: skip
    return outcome(run_trainer(config, tmp_path_factory.mktemp("small") / "run"))


@pytest.fixture(scope="module")
def allocations(folders, tmp_path_factory):  # noqa: F811
    """How many allocations each stage has in its second call."""
    found = {}
    for stage in ("rollout", "teacher", "loss", "validation"):
        config = small(folders)
        recovery = FailingRecovery(config, stage, 0)
        run_trainer(config, tmp_path_factory.mktemp(stage) / "run", recovery)
        found[stage] = recovery.count
    return found


CHANGED = {"rollout": "rollout_rows", "teacher": "micro_batch", "loss": "micro_batch", "validation": "validation_rows"}


@pytest.mark.parametrize(
    ("stage", "share"),
    [("rollout", 0.0), ("rollout", 0.6), ("rollout", 1.0), ("teacher", 0.0), ("teacher", 1.0), ("loss", 0.1),
     ("loss", 0.45), ("loss", 0.8), ("loss", 1.0), ("validation", 0.5)],
)  # fmt: skip
def test_a_failure_at_any_allocation_changes_nothing(
    folders, tmp_path, planned_small, allocations, stage, share  # noqa: F811
):  # fmt: skip
    changed, nth = CHANGED[stage], max(1, round(share * allocations[stage]))
    config = small(folders)
    recovery = FailingRecovery(config, stage, nth)
    trainer = run_trainer(config, tmp_path / "run", recovery)
    assert recovery.count >= nth and len(recovery.said) == 1
    assert f"out of memory ({stage}): {changed}" in recovery.said[0]
    assert f"the {stage} stage is repeated with the same random numbers" in recovery.said[0]
    assert getattr(recovery.sizes, changed) == getattr(Sizes.of(config), changed) // 2
    tokens, weights, losses = outcome(trainer)
    expected_tokens, expected_weights, expected_losses = planned_small
    assert tokens == expected_tokens
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-10, msg=name)
    events = [e for m in trainer.run_dir.read_metrics() for e in m.get("out_of_memory", [])]
    if stage != "validation":  # the last validation comes after the last step's line
        assert [e["stage"] for e in events] == [stage] and "injected" in events[0]["reason"]


def test_the_answers_to_held_out_prompts_shrink_as_a_rollout_does(
    folders, tmp_path, planned_small, monkeypatch  # noqa: F811
):  # fmt: skip
    """Of a run that survived with fewer rows too: when it is resumed, they are written before its first step."""
    rows: list[int] = []
    answers = validation.teacher_answers

    def watched(*asked: Any, batch_size: int, **options: Any) -> Any:
        rows.append(batch_size)
        return answers(*asked, batch_size=batch_size, **options)

    monkeypatch.setattr(validation, "teacher_answers", watched)
    config = small(folders)
    recovery = FailingRecovery(config, "rollout", 5, call=0)
    trainer = run_trainer(config, tmp_path / "run", recovery)
    assert recovery.count >= 5 and rows == [4, 2] and "out of memory (rollout): rollout_rows 4 -> 2" in recovery.said[0]
    tokens, _, losses = outcome(trainer)
    assert tokens == planned_small[0] and losses == pytest.approx(planned_small[2], rel=1e-12)
    one_row = small(folders, rollout__batch_size=1)
    with pytest.raises(MemoryFloorError, match=r"held-out prompts have no answers yet. Free memory.*max_new_tokens"):
        run_trainer(one_row, tmp_path / "floor", FailingRecovery(one_row, "rollout", 5, call=0))


def test_dropout_draws_the_same_after_a_failure(folders, tmp_path, allocations):  # noqa: F811
    lora = {"r": 4, "alpha": 8, "dropout": 0.3}
    one = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 4}
    config = small(folders, student__lora=lora, train__max_steps=1)
    recovery = FailingRecovery(config, "loss", allocations["loss"] // 2, call=1)
    found = outcome(run_trainer(config, tmp_path / "failed", recovery))
    expected = outcome(run_trainer(small(folders, student__lora=lora, train__max_steps=1, **one), tmp_path / "small"))
    assert recovery.said and found[0] == expected[0]
    for name, weight in found[1].items():
        torch.testing.assert_close(weight, expected[1][name], rtol=0, atol=1e-10, msg=name)


def test_at_the_floor_a_checkpoint_is_left_and_the_run_resumes_from_it(folders, tmp_path):  # noqa: F811
    least = {"train__per_device_train_batch_size": 1, "train__gradient_accumulation_steps": 4, "rollout__batch_size": 1,
             "loss__chunk_tokens": 32}  # fmt: skip
    config = small(folders, **least)
    whole = run_trainer(config, tmp_path / "whole")
    for stage in ("rollout", "teacher", "loss"):
        path = tmp_path / stage
        with pytest.raises(MemoryFloorError, match=rf"{stage} stage.*Step 1 was not taken.*rollout.max_new_tokens"):
            run_trainer(config, path, FailingRecovery(config, stage, 1))
        assert RunDir.open(path).latest_checkpoint().name == "step-000001"
        resume(path)
        saved = (path / "checkpoints" / "step-000002" / "adapter" / "adapter_model.safetensors").read_bytes()
        assert (
            saved
            == (
                tmp_path / "whole" / "checkpoints" / "step-000002" / "adapter" / "adapter_model.safetensors"
            ).read_bytes()
        )
    assert whole.step == 2


def test_a_resumed_run_keeps_the_sizes_it_shrank_to(folders, tmp_path):  # noqa: F811
    config = small(folders)
    trainer = run_trainer(config, tmp_path / "run", FailingRecovery(config, "loss", 5))
    saved = torch.load(trainer.run_dir.latest_checkpoint() / "state.pt", weights_only=True)["sizes"]
    assert saved["micro_batch"] == 1
    again = Recovery(Sizes.of(config), CPU, planned_bytes=9, planned_bytes_of=lambda sizes: sizes.micro_batch)
    again.load_state_dict(saved)
    assert again.sizes.micro_batch == 1 and again.planned_bytes == 1


def test_a_host_budget_that_is_exceeded_shrinks_and_then_stops(folders, tmp_path):  # noqa: F811
    config = small(folders, train__max_steps=1)
    said: list[str] = []
    recovery = Recovery(Sizes.of(config), CPU, say=said.append, budget_bytes=resident_bytes() // 2)
    with pytest.raises(MemoryFloorError, match=r"GiB of host memory, its budget is"):
        run_trainer(config, tmp_path / "run", recovery)
    assert [text.split(";")[0] for text in said] == [
        "out of memory (loss): micro_batch 2 -> 1", "out of memory (loss): chunk_tokens 64 -> 32",
    ]  # fmt: skip
    roomy = Recovery(Sizes.of(config), CPU, budget_bytes=1 << 60)
    roomy.check_host_memory()


def test_an_error_that_is_not_of_memory_shrinks_nothing():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        Recovery(Sizes(rollout_rows=2, micro_batch=2, chunk_tokens=1, validation_rows=1), CPU).attempt(
            "loss", lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
        )


def test_an_optimizer_step_allocates_nothing(folders, tmp_path):  # noqa: F811
    """So it cannot fail halfway, with some weights moved and others not."""
    trainer = run_trainer(small(folders, train__max_steps=1), tmp_path / "run")
    for p in trainer.learner.trainable:
        p.grad = torch.ones_like(p)
    with FailAt(0) as mode:
        trainer.learner.optimizer.step()
    assert mode.count == 0

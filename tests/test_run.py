"""One run, one plan: what stands in RUN/plan.json is the plan of what runs, new, resumed, and short of memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qswitch.cli import run as command
from qswitch.config import RunConfig
from qswitch.data.gather import load_prompts
from qswitch.distill.recovery import Recovery, Sizes
from qswitch.errors import ConfigError, PlanError
from qswitch.models.pair import load_pair_tokenizer
from qswitch.models.runtime import Runtime, make_runtime
from qswitch.plan.advice import explain_no_fit
from qswitch.plan.machine import Budget
from qswitch.plan.run_plan import Plan
from qswitch.plan.scheduler import plan_run
from qswitch.run import distill, rehearse, resume
from qswitch.run_dir import RunDir
from qswitch.teach import teach
from tests.distill.test_trainer import folders, settings  # noqa: F401

SHORT_BYTES = 4096
"""What the budgets below lack: so little that a plan with smaller sizes fits them."""


def stored_plan(path: Path) -> dict[str, Any]:
    return json.loads((path / "plan.json").read_text())


def longest_prompt(config: RunConfig) -> int:
    _, training, held_out = load_prompts(config, load_pair_tokenizer(config))
    return max(len(p.prompt_ids) for p in [*training, *held_out])


def own_plan(config: RunConfig) -> Plan:
    """As the run should plan it: for the longest prompt of its data."""
    return plan_run(config, longest_prompt_tokens=longest_prompt(config))


def short(config: RunConfig) -> str:
    """A --vram that is a few KiB too small for the configuration's own sizes."""
    return f"{(own_plan(config).total_bytes - SHORT_BYTES) // 1024}KiB"


def choices(config: RunConfig) -> dict[str, Any]:
    return json.loads(json.dumps(own_plan(config).choices))


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> tuple[RunConfig, Path]:  # noqa: F811
    config = settings(folders, rollout__block_tokens=2, train__max_steps=1)
    path = tmp_path_factory.mktemp("run") / "run"
    distill(config, path)
    return config, path


def test_a_new_run_is_planned_once_and_runs_with_the_sizes_of_its_plan(folders, tmp_path, monkeypatch):  # noqa: F811
    # The tests' process holds what other tests left in it; a run has a process of its own.
    monkeypatch.setattr("qswitch.distill.recovery.resident_bytes", lambda: 0)
    config = settings(folders, rollout__block_tokens=2, train__max_steps=1)
    distill(config, tmp_path / "run", vram=short(config))
    plan, ran = stored_plan(tmp_path / "run"), RunDir.open(tmp_path / "run").config
    assert plan["fits"] and plan["choices"] != choices(config) and plan["choices"] == choices(ran)
    assert plan["total_gib"] == pytest.approx(own_plan(ran).total_gib, abs=1e-4)
    assert ran.data == config.data, "the length that was planned for is no setting"


def test_a_resumed_run_that_a_named_budget_does_not_hold_is_refused(finished, capsys):
    config, path = finished
    before = stored_plan(path)
    own = own_plan(config)
    smaller = plan_run(config, budget_bytes=own.total_bytes - SHORT_BYTES, longest_prompt_tokens=own.prompt_tokens)
    assert smaller.fits and smaller.choices != own.choices
    assert command(["distill", "--resume", str(path), "--vram", short(config)]) == 3
    refusal = capsys.readouterr().err
    assert "sizes that the run began with" in refusal and "Give it at least" in refusal
    assert stored_plan(path) == before


def test_a_resumed_run_that_free_memory_does_not_hold_says_so_and_plans_what_runs(finished, monkeypatch, capsys):
    config, path = finished
    free = own_plan(config).total_bytes - SHORT_BYTES
    monkeypatch.setattr("qswitch.run.find_budget", lambda *_, **__: Budget(free, "a machine short of memory"))
    resume(path)
    plan = stored_plan(path)
    assert not plan["fits"] and plan["choices"] == choices(config)
    assert "more than the" in " ".join(capsys.readouterr().err.split())


class ShortOnce(Recovery):
    """The real recovery, on a device whose first rollout runs out of memory."""

    failed = False

    def attempt(self, stage: str, run: Any, undo: Any = None) -> Any:
        def failing() -> Any:
            if stage == "rollout" and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB (injected)")
            return run()

        return super().attempt(stage, failing, undo)


def test_after_memory_ran_out_the_plan_on_disk_is_that_of_the_smaller_sizes(folders, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("qswitch.distill.session.Recovery", ShortOnce)
    config = settings(folders, rollout__block_tokens=2, train__max_steps=2)
    path = tmp_path / "run"
    distill(config, path)
    halved = Sizes.of(config).smaller("rollout")
    assert halved is not None
    assert stored_plan(path)["choices"]["rollout.batch_size"] == halved.rollout_rows
    assert RunDir.open(path).config.rollout.batch_size == config.rollout.batch_size, "nothing below changes a setting"
    # Resumed, it is measured with the sizes it stopped with.
    smaller = own_plan(halved.write_into(config))
    resume(path, vram=f"{smaller.total_bytes // 1024 + 1}KiB")
    assert stored_plan(path)["total_gib"] == pytest.approx(smaller.total_gib, abs=1e-4)


@pytest.mark.parametrize("start", [distill, teach])
def test_memory_that_is_short_while_models_load_leaves_no_folder(folders, tmp_path, monkeypatch, start):  # noqa: F811
    """The same command works once there is room; a folder with nothing in it would be refused as a run."""

    def full(*_arguments: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")

    for module in ("session", "teaching"):
        monkeypatch.setattr(f"qswitch.distill.{module}.load_teacher", full)
    path = tmp_path / "run"
    config = settings(folders, rollout__policy="teacher", loss__divergence="forward_kl")
    with pytest.raises(torch.OutOfMemoryError):
        start(config, path)
    assert not path.exists()


def test_what_cannot_fit_is_refused_before_anything_is_read(folders, tmp_path, monkeypatch):  # noqa: F811
    """No data are downloaded and no GGUF file is converted for it; the figures are those of `qswitch plan`."""
    config = settings(folders)
    shown, *_ = rehearse(config, vram="0.1GiB")
    monkeypatch.setattr("qswitch.run.read_inputs", lambda *_: pytest.fail("the data were read"))
    monkeypatch.setattr("qswitch.models.pair.load_pair_tokenizer", lambda *_: pytest.fail("the tokenizer was read"))
    with pytest.raises(PlanError) as refused:
        distill(config, tmp_path / "run", vram="0.1GiB")
    assert str(refused.value) == explain_no_fit(shown)
    with pytest.raises(PlanError, match="The teacher alone needs"):
        teach(settings(folders, rollout__policy="teacher", loss__divergence="forward_kl"), tmp_path / "t", vram="1MiB")


def test_what_fits_with_short_prompts_alone_is_not_refused_before_they_are_read(
    folders,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    config = settings(folders, data__max_prompt_tokens=500)
    smallest = plan_run(config, budget_bytes=1, longest_prompt_tokens=longest_prompt(config))
    vram = f"{smallest.total_bytes // 1024 + 1}KiB"
    assert not rehearse(config, vram=vram)[0].fits

    def read(*_: Any) -> Any:
        raise InterruptedError("the data are read")

    monkeypatch.setattr("qswitch.run.read_inputs", read)
    with pytest.raises(InterruptedError, match="the data are read"):
        distill(config, tmp_path / "run", vram=vram)


def test_a_gpu_that_torch_alone_sees_needs_a_named_budget(folders, tmp_path, monkeypatch):  # noqa: F811
    """As in a container without nvidia-smi: the plan would be for the CPU, and the run on the GPU."""
    real = make_runtime

    def on_a_gpu(train: Any) -> Runtime:
        return replace(real(train), device=torch.device("cuda"))

    monkeypatch.setattr("qswitch.models.runtime.make_runtime", on_a_gpu)
    config = settings(folders, train__device="auto")
    alone = settings(folders, train__device="auto", rollout__policy="teacher", loss__divergence="forward_kl")
    for start, asked in ((distill, config), (teach, alone)):
        with pytest.raises(ConfigError, match=r"nvidia-smi does not answer.*--vram 12GiB"):
            start(asked, tmp_path / "run")
    with pytest.raises(PlanError, match=r"the budget is 0\.10"):  # planned for the GPU, context and all
        distill(config, tmp_path / "run", vram="0.1GiB")
    assert not (tmp_path / "run").exists()

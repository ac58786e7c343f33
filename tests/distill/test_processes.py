"""Several processes do one run: the adapter of one process, after a resume too, and one message for what cannot be."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from qswitch.config import TrainSection
from qswitch.distill import supply
from qswitch.distill.processes import Processes, joined
from qswitch.distill.supply import AdaptiveShare
from qswitch.distill.trainer import Trainer
from qswitch.errors import ConfigError, DataError, Interrupted, ModelError, NonFiniteError, PlanError
from qswitch.launch import Launch, launched
from qswitch.layers import build_config, dump_config
from qswitch.models.runtime import make_runtime
from qswitch.run import distill, resume
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders
from tests.distill.test_training_by_method import with_method
from tests.distill.worlds import let_share_grow
from tests.pretended_cuda import pretended_cuda

__all__ = ["folders"]

ROOT = Path(__file__).parents[2]
STEP = {"train__per_device_train_batch_size": 2, "train__gradient_accumulation_steps": 3, "train__max_steps": 3,
        "rollout__max_new_tokens": 8, "train__eval_own_prompts": 0}  # fmt: skip
FP64 = {"train__compute_dtype": "fp64"}
METHODS: dict[str, dict[str, Any]] = {
    "switch": {"data__ground_truth_mix": 0.4, "rollout__reuse": 2, "rollout__decay_rate": 0.5,
               "rollout__block_tokens": 2, **FP64},
    "gkd": {"method": "gkd", "rollout__reuse": 3, **FP64},
    "kd": {"method": "kd", **FP64},
    "distillm": {"method": "distillm", "rollout__replay_capacity": 6, "train__eval_steps": 2, "train__max_steps": 6,
                 **FP64},
    "fp32": {"rollout__decay_rate": 0.5, "rollout__block_tokens": 2, "loss__scope": "all"},
}  # fmt: skip

THREE = ("switch", "distillm")
"""Methods that three processes run too."""


def config_of(folders: Any, name: str, **more: Any) -> Any:
    changes = {**STEP, **METHODS[name], **more}
    return with_method(folders, changes.pop("method", "switch"), **changes)


@pytest.fixture(scope="module")
def worlds(folders: Any, tmp_path_factory: Any) -> tuple[Path, list[list[list[dict[str, Any]]]]]:
    """Every run of several processes that the tests below look at, started together: (folder, answers[world][rank]).

    A first world of one process writes what the stores of the others are compared with.
    """
    folder = tmp_path_factory.mktemp("worlds")
    for name in METHODS:
        (folder / f"{name}.yaml").write_text(dump_config(config_of(folders, name)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 1)
        distill(config_of(folders, "switch"), folder / "from-one")
    other_data = folder / "data.jsonl"
    other_data.write_text(Path(folders[2]).read_text().replace("it is 7", "it is seven"))

    stored = config_of(folders, "kd").model_dump(mode="json", exclude_unset=True)
    stored["teacher"]["responses"] = str(folder / "cut")
    del stored["train"]["eval_own_prompts"]
    (folder / "stored.yaml").write_text(dump_config(build_config(stored)))

    def new(name: str, path: str, **more: Any) -> dict[str, Any]:
        return {"config": str(folder / f"{name}.yaml"), "path": str(folder / path), **more}

    def store(path: str) -> dict[str, Any]:
        return {"config": str(folder / "kd.yaml"), "store": str(folder / path)}

    def with_copy(of: str, to: str, **accident: Any) -> dict[str, Any]:
        return {"copy_of": str(folder / of), "to": str(folder / to), **accident}

    def resumed_store(path: str, **accident: Any) -> dict[str, Any]:
        return {"resume_store": str(folder / path), **with_copy("1-store", path, **accident)}

    one = [store("1-store")]

    two = [new(name, f"2-{name}") for name in METHODS]
    two += [new("switch", "to-one", stop_at=1, stop_rank=1)]
    two += [{"resume": str(folder / "from-one")}]
    two += [new("switch", "other-rate", set_1={"train.learning_rate": 0.25})]
    # One name for two files, as on two machines.
    here = {f"set_{rank}": {"data.train": "data.jsonl"} for rank in (0, 1)}
    two += [new("switch", "other-data", cwd_0=str(Path(folders[2]).parent), cwd_1=str(folder), **here)]
    two += [store("2-store"), resumed_store("2-resumed", without=["part-000001", "part-000004"])]
    two += [new("stored", "of-cut", **with_copy("1-store", "cut", cut=["part-000001/rows.safetensors"]))]
    three = [new(name, f"3-{name}") for name in THREE]
    three += [{"resume": str(folder / "to-three"), **with_copy("to-one", "to-three")}]
    three += [resumed_store("3-resumed", without=["part-000000", "part-000003"], cut=["part-000002/rows.safetensors"])]
    three += [new("switch", "unequal", set_0=(shape := {"train.gradient_accumulation_steps": 2}), set_1=shape,
                  set_2=shape, escapes=True)]  # fmt: skip
    request = [{"processes": 1, "runs": one}, {"processes": 2, "runs": two}, {"processes": 3, "runs": three}]
    subprocess.run(
        [sys.executable, "-m", "tests.distill.worlds", str(folder)], input=json.dumps(request), text=True, check=True,
        timeout=1200, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder, [
        [json.loads((folder / f"{number}-{rank}.json").read_text()) for rank in range(number + 1)] for number in (1, 2)
    ]


def stop_at(patch: pytest.MonkeyPatch, step: int) -> None:
    original = Trainer.train_step

    def stopping(self: Trainer) -> Any:
        self.stop_requested = self.step == step
        return original(self)

    patch.setattr(Trainer, "train_step", stopping)


@pytest.fixture(scope="module")
def alone(folders: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """The same runs in one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name in METHODS:
        with pytest.MonkeyPatch.context() as patch:
            if name == "distillm":
                patch.setattr(supply, "PHI_STEP", supply.PHI_STEP)
                patch.setattr(AdaptiveShare, "observe", AdaptiveShare.observe)
                let_share_grow()
            distill(config_of(folders, name), folder / name)
    return {name: folder / name for name in METHODS}


def largest_difference(one: Path, other: Path) -> float:
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys() and any(t.abs().max() > 1e-3 for n, t in ours.items() if "lora_B" in n)
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


TOGETHER = [("2", name) for name in METHODS] + [("3", name) for name in THREE]


@pytest.mark.parametrize(("count", "name"), TOGETHER)
def test_several_processes_end_with_the_adapter_of_one(worlds, alone, count: str, name: str):
    folder, _ = worlds
    limit = 1e-5 if name == "fp32" else 1e-10
    assert largest_difference(folder / f"{count}-{name}", alone[name]) <= limit
    ours, theirs = (RunDir.open(path).read_metrics() for path in (folder / f"{count}-{name}", alone[name]))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() & {"batch", "fresh", "replayed", "loss_tokens", "rollout_tokens"}:
            assert mine[key] == other[key], (mine["step"], key)
        for key in mine.keys() & {"loss", "grad_norm", "kl_nats", "response_loss_nats", "teacher_share", "jsd_bits"}:
            assert mine[key] == (None if other[key] is None else pytest.approx(other[key], abs=limit, rel=limit)), key
    for path, says in ((folder / f"{count}-{name}", True), (alone[name], False)):
        assert (f"steps in {count} processes" in (path / "adapter" / "README.md").read_text()) == says
        assert (f", {count} processes" in (path / "report.html").read_text()) == says
    if name == "distillm":
        assert {line["batch"] for line in ours if "batch" in line} == {"ground_truth", "rollout", "replay"}


def test_a_run_goes_on_with_another_number_of_processes(folders, worlds, alone):
    folder, (two, _) = worlds
    stops = [answer for answer in two[0] if answer.get("interrupted")]
    assert len(stops) == 1, "the second process was asked to stop, and both did"
    resume(folder / "to-one")
    for path in ("to-one", "to-three", "from-one"):
        assert largest_difference(folder / path, alone["switch"]) <= 1e-10, path
        steps = [line["step"] for line in RunDir.open(folder / path).read_metrics() if "loss" in line]
        assert steps == [1, 2, 3]


def test_processes_that_would_do_different_runs_are_refused_by_each_with_one_message(worlds):
    folder, (two, three) = worlds
    for path, answers, number, pattern in (
        ("other-rate", two, 0, "Process 1 would do another run than process 0: train.learning_rate is 0.25 there"),
        ("other-data", two, 1, "Process 1 would do another run than process 0: the training prompts are others there"),
        ("of-cut", two, 2, "rows.safetensors has"),
        ("unequal", three, 0, "3 processes cannot share the 4 sequences of a step equally"),
    ):
        said = [[one for one in answer if "error" in one][number] for answer in answers]
        assert all(pattern in one["error"] and one["exit_code"] == 2 for one in said), said
        assert not (folder / path).exists(), "nothing was begun"
    assert sorted(answer[-1]["said_elsewhere"] for answer in three) == [False, True, True], "one of them says it"


def test_several_processes_write_the_store_of_one(worlds):
    """Bit for bit, also what was missing or damaged, whoever writes it."""
    folder, _ = worlds
    files = sorted(path.relative_to(folder / "1-store") for path in (folder / "1-store").rglob("*") if path.is_file())
    assert len({path.parts[0] for path in files if path.parts[0].startswith("part-")}) == 5
    for name in ("2-store", "2-resumed", "3-resumed"):
        found = sorted(path.relative_to(folder / name) for path in (folder / name).rglob("*") if path.is_file())
        assert found == files and json.loads((folder / name / "store.json").read_text())["complete"]
        for path in files:
            if path.name != "store.json":  # which says how long it took
                assert (folder / name / path).read_bytes() == (folder / "1-store" / path).read_bytes(), (name, path)


def test_a_port_in_use_and_a_process_without_a_card_are_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="is in use by another program"), joined():
            pass
    with pretended_cuda(1), pytest.raises(ModelError, match="torch sees 1 GPUs, so process 0 has none") as refused:
        make_runtime(TrainSection(device="cuda"))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_work_is_divided_without_gaps_and_nearly_equally(count: int):
    draw = random.Random(count)
    for num in (0, 1, count, 3 * count + 1, 24):
        costs = [draw.randint(1, 300) for _ in range(num)]
        owners = Processes(Launch(count)).divide(costs)
        assert owners == Processes(Launch(count, count - 1)).divide(costs), "every process divides alike"
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(count)]
        nums = [owners.count(rank) for rank in range(count)]
        assert sum(nums) == num and max(nums) - min(nums) <= 1
        assert not costs or max(loads) - min(loads) <= max(costs)


def test_errors_cross_from_one_process_to_another():
    for error in (ConfigError(["one", "two"], "file"), NonFiniteError("teacher", "logits are"), PlanError("no"),
                  DataError("line 3")):  # fmt: skip
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.exit_code) == (type(error), str(error), error.exit_code)


def test_the_launcher_is_read_and_half_of_one_refused():
    assert launched({}) == launched({"WORLD_SIZE": "1"}) == Launch()
    full = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a",
            "MASTER_PORT": "1"}  # fmt: skip
    assert launched(full) == Launch(4, 3, 1, 2)
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_PORT is not set"):
        launched({**full, "LOCAL_RANK": "", "MASTER_PORT": ""})
    with pytest.raises(ConfigError, match="must be a number"):
        launched({**full, "RANK": "first"})

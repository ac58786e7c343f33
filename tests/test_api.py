"""qswitch from Python: the same configuration, plan and run as the command line, and the errors of both."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import qswitch
from qswitch.cli import run
from qswitch.config import RunConfig
from qswitch.errors import ConfigError, RunDirError
from qswitch.presets import load_run_config
from qswitch.run_dir import RunDir
from qswitch.teach import teach
from tests.tiny import save_tiny_pair


def settings_of(folder: Path) -> dict[str, Any]:
    """A run of two tiny models over three steps of a few tokens."""
    teacher, student = save_tiny_pair(folder / "pair")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"tell me about {'abcdefg'[i % 7] * i}"}) + "\n" for i in range(1, 21))
    )
    return {
        "teacher": {"model": str(teacher), "precision": "nf4"},
        "student": {"model": str(student), "lora": {"r": 4}},
        "data": {"train": str(prompts), "num_validation": 3},
        "rollout": {"max_new_tokens": 4, "batch_size": 4},
        "train": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
                  "device": "cpu"},
    }  # fmt: skip


def test_configure_is_the_configuration_of_the_command_line():
    ours = qswitch.configure("smollm2-demo", data="mine.jsonl", method="gkd", settings={"train.max_steps": 3})
    theirs = load_run_config("smollm2-demo", ["data.train=mine.jsonl", "method=gkd", "train.max_steps=3"])
    assert ours == theirs
    assert qswitch.configure(ours) is ours
    assert qswitch.configure(ours, settings={"train": {"max_steps": 4}}).train.max_steps == 4


def test_configure_chooses_what_is_left_open_for_a_pair(tmp_path):
    own = settings_of(tmp_path)
    config = qswitch.configure(
        teacher=own["teacher"]["model"], student=own["student"]["model"], data=[own["data"]["train"]], vram="12GiB"
    )
    assert config.data.train == [own["data"]["train"]] and config.student.lora.r == 16  # of a student this small


def test_a_student_is_cut_from_the_teacher_of_any_source():
    below = {"teacher": {"model": "smollm"}, "student": {"model": "x"}, "data": {"train": "a.jsonl"}}
    for source in (below, qswitch.configure(below)):
        student = qswitch.configure(source, student="shrink:9").student
        assert (student.model, student.shrink_to_layers) == ("smollm", 9)
    preset = qswitch.configure("qwen2.5-7b-to-1.5b", student="shrink")
    assert (preset.student.model, preset.student.shrink_to_layers) == (preset.teacher.model, 18)


def test_folders_of_the_home_are_written_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = qswitch.configure("smollm2-demo")
    path = RunDir.create(tmp_path / "runs" / "a", config).path
    assert qswitch.load_run("~/runs/a").path == path
    for begin in (lambda: qswitch.distill(config, "~/runs/a"), lambda: teach(config, Path("~/runs/a"))):
        with pytest.raises(RunDirError, match=f"{path} is not empty"):
            begin()
    assert run(["distill", "--preset", "smollm2-demo", "--output-dir=~/runs/a", "--dry-run"]) == 2
    assert not (tmp_path / "~").exists()


def test_a_wrong_setting_has_the_command_lines_message():
    with pytest.raises(ConfigError, match=r"train\.max_step is not a setting\. Did you mean train\.max_steps"):
        qswitch.configure("smollm2-demo", settings={"train.max_step": 3})


def test_plan_is_what_the_command_prints(capsys):
    plan = qswitch.plan("qwen2.5-7b-to-1.5b", gpu="rtx3060-12gb")
    assert run(["plan", "--preset", "qwen2.5-7b-to-1.5b", "--gpu", "rtx3060-12gb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(plan.to_dict()))
    assert plan.fits and not qswitch.plan("qwen2.5-7b-to-1.5b", vram="3GiB").fits


def test_times_are_none_where_the_docstring_says_so():
    counted, uncounted = (qswitch.plan(qswitch.configure("qwen2.5-7b-to-1.5b", settings=settings), gpu="rtx3060-12gb")
                          for settings in ({}, {"train.num_epochs": 2}))  # fmt: skip
    assert counted.num_steps == 1000 and counted.seconds >= counted.num_steps * counted.step_seconds > 0
    assert (uncounted.seconds, uncounted.num_steps) == (None, None) and uncounted.step_seconds is not None
    on_cpu = qswitch.plan(qswitch.configure("smollm2-demo", settings={"train.device": "cpu"}), vram="24GiB")
    assert on_cpu.seconds is None and on_cpu.step_seconds is None


def test_of_several_processes_the_first_ones_folder_is_the_run(tmp_path, monkeypatch):
    """As the second of two sees it: the first has made a folder of this second already."""
    monkeypatch.chdir(tmp_path)
    config, first = qswitch.configure("smollm2-demo"), tmp_path / "runs" / "of-the-first"

    class Second:
        def from_first(self, action: Callable[[], Any]) -> Path:
            return first

    @contextmanager
    def joined() -> Iterator[Second]:
        yield Second()

    monkeypatch.setattr("qswitch.distill.processes.joined", joined)
    monkeypatch.setattr("qswitch.run.distill", lambda config, path, vram: RunDir.create(path, config))
    assert qswitch.distill(config).path == first
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["of-the-first"], "it made none of its own"


def test_distill_resume_generate_merge_report(tmp_path):
    config = qswitch.configure(settings_of(tmp_path))
    finished = qswitch.distill(config, tmp_path / "RUN")
    assert finished.summary is not None and finished.summary["steps"] == 2
    assert [line["step"] for line in finished.metrics if "loss" in line] == [1, 2]

    longer = qswitch.load_run(tmp_path / "RUN").resume(settings={"train.max_steps": 3})
    assert longer.summary is not None and longer.summary["steps"] == 3 and longer.config.train.max_steps == 3

    answers = longer.generate(["hello", "bye"], max_new_tokens=3)
    assert [a.prompt for a in answers] == ["hello", "bye"] and all(1 <= len(a.tokens) <= 3 for a in answers)
    assert longer.generate("bye", max_new_tokens=3)[0].prompt == "bye"

    report = longer.merge()
    assert report.agrees and (tmp_path / "RUN/merged/config.json").is_file()
    longer.report(tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_run_that_is_not_there_or_not_finished(tmp_path):
    with pytest.raises(RunDirError, match="does not exist"):
        qswitch.load_run(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text(qswitch.configure("smollm2-demo").model_dump_json())
    assert qswitch.load_run(tmp_path).summary is None and qswitch.load_run(tmp_path).metrics == []


def test_folders_that_are_called_stay_folders():
    import qswitch.distill.metrics as metrics
    import qswitch.plan.machine as machine

    assert qswitch.plan.machine is machine and qswitch.distill.metrics is metrics  # type: ignore[attr-defined]
    assert list(inspect.signature(qswitch.plan).parameters) == ["config", "vram", "gpu"]
    assert set(qswitch.__all__) <= set(dir(qswitch))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        qswitch.distil  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", [n for n in qswitch.__all__ if n != "__version__"])
def test_what_is_public_is_typed_and_explained(name):
    from qswitch import api

    public = getattr(api, name)
    methods = [m for n, m in vars(public).items() if not n.startswith("_")] if inspect.isclass(public) else [public]
    functions = [m.fget if isinstance(m, property) else m for m in methods]
    for function in [f for f in functions if inspect.isfunction(f)]:
        assert inspect.getdoc(function), function.__qualname__
        hints = {**function.__annotations__}
        assert set(inspect.signature(function).parameters) - {"self"} <= set(hints) and "return" in hints
    assert (Path(qswitch.__file__).parent / "py.typed").is_file()
    assert isinstance(qswitch.configure("smollm2-demo"), RunConfig)

"""The run directory: whole files or none, logs that can be cut, and no run overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from qswitch import run_dir
from qswitch.errors import ConfigError, RunDirError
from qswitch.layers import build_config
from qswitch.run_dir import RunDir, write_atomically
from qswitch.teach import _own_config

PAIR = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "a.jsonl"}}


@pytest.fixture
def config():
    return build_config(PAIR)


def test_create_writes_a_configuration_that_open_reads_back(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "deep" / "run", config)
    assert RunDir.open(run.path).config == config


def test_a_run_opens_although_a_later_release_refuses_a_setting_that_it_does_not_read(tmp_path: Path):
    """Every token of this run has the divergence of its writer, so that loss.divergence never had a reader."""
    own = {"method": "switch", "loss": {"divergence_teacher_tokens": "jsd"}}
    run = RunDir.create(tmp_path / "run", build_config(PAIR, own))
    written = yaml.safe_load(run.config_path.read_text())
    written["loss"]["divergence"] = "jsd"
    with pytest.raises(ConfigError, match=r"loss\.divergence has no effect"):
        build_config(written)
    run.config_path.write_text(yaml.safe_dump(written))
    assert RunDir.open(run.path).config == _own_config(run.path) == run.config
    assert RunDir.open(run.path, {"train": {"save_steps": 7}}).config.train.save_steps == 7
    run.config_path.write_text(yaml.safe_dump(written | {"losss": 1}))
    with pytest.raises(ConfigError, match="losss is not a setting"):
        RunDir.open(run.path)


@pytest.mark.parametrize(
    ("train", "rollout", "data", "said"),
    [
        ({"warmup_steps": 50.0, "max_tokens": 100_000, "max_steps": 1000}, {}, {}, r"train\.warmup_steps=50 counts"),
        ({}, {"reuse": 64}, {}, "is out of reach with 16 sequences"),
        ({}, {"reuse": 16, "replay_max_age_steps": 20}, {"ground_truth_mix": 0.5}, "replay_max_age_steps=20 drops"),
    ],
)
def test_a_run_of_before_opens_whatever_a_later_release_refuses_to_train(tmp_path: Path, train, rollout, data, said):
    """As version 0197b5a wrote such a run: it may be looked at, merged and measured, and goes on only when mended."""
    run = RunDir.create(tmp_path / "run", build_config(PAIR, {"method": "gkd"}))
    written = yaml.safe_load(run.config_path.read_text())
    for section, values in (("train", train), ("rollout", rollout), ("data", data)):
        written[section] |= values
    with pytest.raises(ConfigError, match=said):
        build_config(written)
    run.config_path.write_text(yaml.safe_dump(written))
    opened = RunDir.open(run.path).config
    assert opened.train.warmup_steps == written["train"]["warmup_steps"]
    assert opened.rollout.reuse == written["rollout"]["reuse"] and _own_config(run.path) == opened
    for changes in (None, {"train.save_steps": 7}):
        with pytest.raises(ConfigError, match=said):
            RunDir.open(run.path, changes, trains=True)
    if "warmup_steps" in train:
        mended = RunDir.open(run.path, {"train.warmup_steps": 0.05}, trains=True).config.train
        assert (mended.warmup_steps, mended.max_tokens, mended.max_steps) == (0.05, 100_000, 1000)


def test_a_limit_that_a_resumed_run_loses_is_said(tmp_path: Path, caplog):
    both = {"train": {"max_steps": 2000, "max_tokens": 10**6}}
    path = RunDir.create(tmp_path / "run", build_config(PAIR, both)).path
    longer = RunDir.open(path, {"train.max_tokens": 2 * 10**6}, trains=True)
    assert longer.config.train.step_limit is None
    assert "train.max_steps=2000 no longer ends the run: --set names train.max_tokens" in caplog.text
    before = {"settings": {"train.max_steps": 2000, "train.max_tokens": 10**6}}
    assert "train.max_steps is no limit now, it was 2000" in longer.changed_since(before)
    caplog.clear()
    kept = RunDir.open(path, {"train": {"max_tokens": 2 * 10**6, "max_steps": 2000}}, trains=True)
    taken_back = RunDir.open(path, {"train": {"max_tokens": None}}, trains=True)
    assert (kept.config.train.step_limit, taken_back.config.train.step_limit) == (2000, 2000) and not caplog.text
    RunDir.open(path, {"train.max_steps": 3000}, trains=True)
    assert "train.max_tokens=1000000 no longer ends the run: --set names train.max_steps" in caplog.text


def test_a_run_is_never_overwritten(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    with pytest.raises(RunDirError, match=r"not empty.*--resume .*another --output-dir"):
        RunDir.create(run.path, config)


def test_a_folder_that_is_no_run_is_not_offered_for_resuming(tmp_path: Path, config):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunDirError) as caught:
        RunDir.create(tmp_path, config)
    assert "--resume" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.txt"]


def test_an_empty_folder_is_fine(tmp_path: Path, config):
    assert RunDir.create(tmp_path, config).config_path.is_file()


def test_a_file_in_the_way_is_named(tmp_path: Path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot be made"):
        RunDir.create(tmp_path / "file" / "run", config)


@pytest.mark.parametrize("exists", [True, False])
def test_opening_what_is_no_run_says_which(tmp_path: Path, exists: bool):
    path = tmp_path if exists else tmp_path / "none"
    with pytest.raises(RunDirError, match=r"no config\.yaml" if exists else "does not exist"):
        RunDir.open(path)


def test_logs_grow_by_lines_and_skip_the_unfinished_one_of_a_crash(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    assert run.read_metrics() == []
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": 0.25})
    with run.metrics_path.open("a") as handle:
        handle.write('{"step": 3, "lo')
    assert [m["step"] for m in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"[1]", b'{"loss": 1.0}', b'{"step": "4"}', b"", b"null", b'{"step": 2, "lo']
)
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, config, caplog, damage: bytes):
    run = RunDir.create(tmp_path / "run", config)
    run.metrics_path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert run.read_metrics() == [{"step": 1}, {"step": 3}]
    assert f"{run.metrics_path}: 1 damaged lines are left out (2)" in caplog.text
    run.truncate_logs(3)
    caplog.clear()
    assert run.read_metrics() == [{"step": 1}, {"step": 3}] and not caplog.text


def test_what_may_change_in_a_run_is_recorded_and_the_rest_refused_by_name(tmp_path: Path, config):
    path = RunDir.create(tmp_path / "run", config).path
    changes = {"train": {"learning_rate": 1e-6, "max_steps": 300, "eval_steps": config.train.eval_steps}}
    run = RunDir.open(path, changes)
    assert run.config.train.learning_rate == 1e-6 and run.config.train.max_steps == 300
    assert RunDir.open(path).config == config, "nothing is written before the run goes on"
    run.record_changes()
    assert RunDir.open(path).config == run.config
    (line,) = [json.loads(text) for text in (path / "changes.jsonl").read_text().splitlines()]
    assert line == {
        "resumed_from": None,
        "changes": {"train.learning_rate": [1e-4, 1e-6], "train.max_steps": [200, 300]},
    }
    RunDir.open(path, {"train.max_steps": 300}).record_changes()  # no change
    assert len((path / "changes.jsonl").read_text().splitlines()) == 1
    refused = {"seed": 3, "rollout.decay_rate": 0.2, "lora_r": 4, "train.learning_rate": 1e-5}
    with pytest.raises(ConfigError, match=r"^rollout\.decay_rate, seed, student\.lora\.r cannot change in a run"):
        RunDir.open(path, refused)


def test_logs_survive_the_line_separators_that_models_write(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    rows = [
        {"step": 1, "prompt": "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng", "tokens": []},
        {"step": 2, "prompt": "h", "tokens": []},
    ]
    run.append_rollouts(rows)
    assert run.read_rollouts() == rows
    run.truncate_logs(1)
    assert run.read_rollouts() == rows[:1]


def test_truncate_logs_drops_what_a_resumed_run_writes_again(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
        run.append_rollouts([{"step": step, "prompt": "größer", "tokens": []}] * 2)
    with run.metrics_path.open("a") as handle:
        handle.write('{"step": 4')
    run.truncate_logs(2)
    run.append_metrics({"step": 3, "again": True})
    assert [m["step"] for m in run.read_metrics()] == [1, 2, 3]
    assert [r["step"] for r in run.read_rollouts()] == [1, 1, 2, 2]
    assert run.read_rollouts()[0]["prompt"] == "größer"


def test_a_truncated_log_holds_no_rest_of_a_crash_even_at_step_0(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    run.metrics_path.write_text('{"step": 1, "lo')
    run.truncate_logs(0)
    run.append_metrics({"step": 1})
    assert run.read_metrics() == [{"step": 1}]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "plan.json"
    write_atomically(path, "old")

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_write_json_is_json(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    run.write_json("plan.json", {"teacher": "大"})
    assert json.loads((run.path / "plan.json").read_text(encoding="utf-8")) == {"teacher": "大"}


def test_checkpoints_sort_by_step_and_those_being_written_or_set_aside_are_none(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    assert run.checkpoints() == [] and run.latest_checkpoint() is None
    for name in ("step-000100", "step-000020", ".step-000300.0123abcd.partial", "damaged-step-000200"):
        (run.checkpoints_path / name).mkdir(parents=True)
    assert [p.name for p in run.checkpoints()] == ["step-000020", "step-000100"]
    assert run.latest_checkpoint() == run.checkpoints_path / "step-000100"


def test_a_run_without_steps_is_discarded_and_one_with_steps_stays(tmp_path, config):
    unstarted = RunDir.create(tmp_path / "unstarted", config)
    unstarted.write_json("plan.json", {})
    unstarted.discard_unstarted()
    assert not unstarted.path.exists()
    started = RunDir.create(tmp_path / "started", config)
    started.append_metrics({"step": 1})
    started.discard_unstarted()
    assert started.config_path.exists()


def test_a_run_without_a_name_never_takes_the_folder_of_one_that_began_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20261129-120000")
    with ExitStack() as held:  # commands that still read their data
        paths = [held.enter_context(run_dir.folder_of_its_own(None, "my")) for _ in range(3)]
        names = ["my-20261129-120000", "my-20261129-120000-2", "my-20261129-120000-3"]
        assert [str(path) for path in paths] == [f"runs/{name}" for name in names]
        (paths[1] / "config.yaml").touch()
    assert list(Path("runs").iterdir()) == [paths[1]], "the others wrote nothing"
    with run_dir.folder_of_its_own(None) as path:
        assert path == Path("runs/20261129-120000")
    paths[1].joinpath("config.yaml").unlink()
    paths[1].rmdir()
    Path("runs").rmdir()
    with pytest.raises(RunDirError), run_dir.folder_of_its_own(None) as path:
        raise RunDirError("its data cannot be read")
    assert not Path("runs").exists()
    Path("runs").write_text("")
    with pytest.raises(RunDirError, match="cannot be made"), run_dir.folder_of_its_own(None):
        raise AssertionError("begun in a file")


def test_a_store_is_resumed_as_one_and_a_run_as_a_run(tmp_path: Path, config):
    """Whatever command is repeated on a folder, the advice is for what lies there, and the other command refuses it."""
    store = RunDir.create(tmp_path / "store", config, "teach").path
    with pytest.raises(RunDirError, match=f"Resume it with `qswitch teach --resume {store}`"):
        RunDir.refuse_existing(store, "teach")  # killed before it wrote anything
    (store / "part-000000").mkdir()
    for command in ("distill", "teach"):
        with pytest.raises(RunDirError, match=f"Resume it with `qswitch teach --resume {store}`"):
            RunDir.refuse_existing(store, command)
    with pytest.raises(RunDirError, match=f"store of a teacher's work.*teacher.responses={store}.*qswitch teach"):
        RunDir.open(store)
    assert _own_config(store) == config

    run = RunDir.create(tmp_path / "run", config)
    run.write_json("data.json", {})
    for command in ("distill", "teach"):
        with pytest.raises(RunDirError, match=f"Resume it with `qswitch distill --resume {run.path}`"):
            RunDir.refuse_existing(run.path, command)
    with pytest.raises(RunDirError, match=f"is a run.*qswitch distill --resume {run.path}"):
        _own_config(run.path)
    run.write_json("store.json", {})  # an earlier version trained into a store: what it trained stays readable
    assert RunDir.open(run.path).config == config


def test_what_only_says_where_something_lies_may_be_edited(tmp_path: Path, config):
    run = RunDir.create(tmp_path / "run", config)
    run.write_json("teacher_graphs.json", {"used": True})
    written = json.loads(json.dumps(run.as_written()))
    assert "teacher_graphs.json" in written["kept_files"]
    moved = {"method": "kd", "teacher": {"responses": "/elsewhere/store"}}
    before = RunDir(run.path, build_config(PAIR, {"method": "kd", "teacher": {"responses": "/mnt/store"}})).as_written()
    (said,) = RunDir(run.path, build_config(PAIR, moved)).changed_since(json.loads(json.dumps(before)))
    assert "teacher.responses is /elsewhere/store now, it was /mnt/store" in said
    for edited in ({"rollout.teacher_graphs": "off"}, {"teacher.num_gpus": 2}):
        assert len(RunDir(run.path, build_config(PAIR, edited)).changed_since(written)) == 1
    with pytest.raises(RunDirError, match=r"teacher\.precision is bf16"):
        RunDir(run.path, build_config(PAIR, {"teacher.precision": "bf16"})).changed_since(written)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_disk_without_locks_locks_nothing_and_another_error_stays(tmp_path: Path, monkeypatch, number: int):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    held: list[Path] = []
    try:
        with run_dir.locked(tmp_path):
            held.append(tmp_path)
    except OSError as error:
        assert (error.errno, number) == (errno.EIO, errno.EIO)
    assert held == ([] if number == errno.EIO else [tmp_path])

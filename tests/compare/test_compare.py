"""`qswitch compare`: cells from one start, one budget, no finished cell twice, no failure that ends the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qswitch import cli
from qswitch.compare.cells import CellFailed, compare
from qswitch.compare.spec import read_comparison
from qswitch.errors import RunDirError
from qswitch.terminal import ERROR_FILE
from tests.compare.comparisons import Launcher, swap_two_tokens, write_comparison
from tests.evaluate.runs import WORDS


def test_an_interrupted_comparison_goes_on_and_repeats_no_finished_cell(tmp_path: Path, capsys, monkeypatch):
    path, out = write_comparison(tmp_path), tmp_path / "out"
    first = Launcher(stop_at=5)  # switch trained and scored, and the controls; gkd trained
    with pytest.raises(KeyboardInterrupt):
        compare(path, out, launch=first, say=lambda _: None)
    assert first.kinds() == [
        "distill --config", "eval switch-seed1", "eval switch-seed1:teacher", "eval switch-seed1:base",
        "distill --config",
    ]  # fmt: skip
    finished = out / "cells/switch-seed1.json"
    before = finished.read_bytes(), finished.stat().st_mtime_ns
    assert not (out / "cells/gkd-seed1.json").exists()
    assert "switch" in (out / "results.md").read_text(encoding="utf-8"), "the table so far"

    # The run of gkd is stopped in mid-run: it resumes from its checkpoint instead of starting anew.
    run_path = out / "runs/gkd-seed1"
    (run_path / "summary.json").unlink()
    shutil.rmtree(run_path / "checkpoints/step-000002")
    second = Launcher()
    results = compare(path, out, launch=second, say=lambda _: None)
    commands = [(c[0], c[1].rpartition("/")[2]) for c in second.commands]
    assert second.commands[0] == ["distill", "--resume", str(run_path)]
    assert commands[1:] == [("eval", "gkd-seed1"), ("distill", "--config"), ("eval", "sft-seed1")]
    assert (finished.read_bytes(), finished.stat().st_mtime_ns) == before
    one = results["sets"]["questions"]
    assert "The declared test" not in (out / "results.md").read_text(encoding="utf-8"), "none was declared"
    assert list(one["models"]) == ["switch", "gkd", "sft", "teacher", "untrained"]
    assert set(one["differences"]) == {"gkd", "sft", "teacher", "untrained"}
    assert abs(one["models"]["teacher"]["metrics"]["kl_nats"]["all"]["mean"]) < 1e-6
    paired = one["differences"]["gkd"]["kl_nats"]["all"]["mean"]
    means = {name: one["models"][name]["metrics"]["kl_nats"]["all"]["mean"] for name in ("switch", "gkd")}
    assert paired == pytest.approx(means["gkd"] - means["switch"])
    assert results["cells"]["gkd"]["steps"] == 2 and results["cells"]["sft"]["rollout_tokens"] == 0
    assert 0 <= results["cells"]["switch"]["teacher_share"] <= 1
    metrics = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]

    # Finished: nothing is started.
    third = Launcher()
    again = compare(path, out, launch=third, say=lambda _: None)
    assert third.commands == [] and again["sets"] == results["sets"]
    protocol = (out / "results.md").read_text(encoding="utf-8")
    assert "Protocol greedy: seeds" in protocol and "responses up to 8 tokens" in protocol
    assert "Differs from that protocol: max_new_tokens" in protocol and "Teacher: " in protocol

    # Another budget is another comparison; a new cell is not.
    with pytest.raises(RunDirError, match=r"switch-seed1 with other settings \(budget.amount, train.max_steps\)"):
        compare(write_comparison(tmp_path, budget={"unit": "steps", "amount": 3}), out, say=lambda _: None)


@pytest.mark.parametrize(("unit", "amount"), [("tokens", 60), ("seconds", 0.001)])
def test_budgets_of_tokens_and_seconds_end_a_run(tmp_path: Path, unit: str, amount: float):
    cells = {"sft": {"settings": {"method": "sft"}}, "switch": {}}
    path = write_comparison(tmp_path, budget={"unit": unit, "amount": amount}, cells=cells)
    results = compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    cells = results["cells"]
    if unit == "seconds":
        assert cells["sft"]["steps"] == cells["switch"]["steps"] == 1, "the step that reaches the budget is the last"
        return
    for name, key in (("sft", "trained_tokens"), ("switch", "rollout_tokens")):
        metrics = (tmp_path / f"out/runs/{name}-seed1/metrics.jsonl").read_text().splitlines()
        spent = [
            m["loss_tokens"] if name == "sft" else m["rollout_tokens"] for m in map(json.loads, metrics) if "loss" in m
        ]
        assert sum(spent) == cells[name][key] >= amount > sum(spent[:-1]), "no step more and none fewer"
        rates = [m["learning_rate"] for m in map(json.loads, metrics) if "loss" in m]
        assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * 5e-3, "the schedule follows the budget"


def test_the_declared_test_stands_in_the_table(tmp_path: Path):
    cells = {"switch": {}, "sft": {"settings": {"method": "sft"}}}
    path = write_comparison(tmp_path, cells=cells, test={"against": ["sft"], "margins": {"kl_nats": 0.5}})
    compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    table = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.partition("The declared test")[2].splitlines() if line.startswith("| KL")]
    assert "| sft |" in row and "| 0.5 |" in row
    assert any(verdict in row for verdict in ("better", "worse", "equivalent", "undecided"))


def test_a_failing_cell_ends_no_other_and_is_said_at_the_end(tmp_path: Path):
    cells = {"broken": {"settings": {"data.train": "nowhere.jsonl"}}, "sft": {"settings": {"method": "sft"}}}
    path, out = write_comparison(tmp_path, cells=cells, baseline="sft"), tmp_path / "out"

    class Full(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            code = super().__call__(arguments)
            return 3 if "broken" in " ".join(arguments) else code  # as a plan that does not fit

    launcher = Full()
    with pytest.raises(CellFailed, match=r"training of broken-seed1 ended with code 3: .*nowhere.jsonl") as it:
        compare(path, out, launch=launcher, say=lambda _: None)
    assert it.value.exit_code == 3 and "out/results.md is without what failed" in str(it.value)
    assert f"To see it again: qswitch distill --config {out}/cells/broken-seed1.yaml" in str(it.value)
    assert launcher.kinds()[1:] == [
        "distill --config",
        "eval sft-seed1",
        "eval sft-seed1:teacher",
        "eval sft-seed1:base",
    ]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["failed"]) == ["broken-seed1"] and "sft" in results["sets"]["questions"]["models"]
    (row,) = [r for r in (out / "results.md").read_text(encoding="utf-8").splitlines() if "broken-seed1 is" in r]
    assert "nowhere.jsonl does not exist" in row, "why, although the night's messages are gone"
    again = Full()
    with pytest.raises(CellFailed):
        compare(path, out, launch=again, say=lambda _: None)
    assert again.kinds() == ["distill --config"], "it alone is tried again"


def test_a_control_that_fails_is_tried_once_and_keeps_the_table(tmp_path: Path, finished):
    path, out = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    for name in ("gkd-seed1.json", "sft-seed1.json"):
        (out / "cells" / name).unlink()
    shutil.rmtree(out / "eval/models/untrained")

    class NoControl(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            failing = arguments[1].startswith("untrained=")
            return 2 if failing and not self.commands.append(list(arguments)) else super().__call__(arguments)

    launcher = NoControl()
    with pytest.raises(CellFailed, match="evaluation of the control untrained ended with code 2"):
        compare(path, out, launch=launcher, say=lambda _: None)
    assert launcher.kinds() == ["eval gkd-seed1", "eval switch-seed1:base", "eval sft-seed1"]
    assert set(json.loads((out / "results.json").read_text())["cells"]) == {"switch", "gkd", "sft"}


def test_where_only_the_hub_knows_the_tokenizers_the_run_itself_refuses_two(tmp_path: Path):
    """As if the student's files came with the run: SeqKD alone would train it from text."""
    path = write_comparison(tmp_path, settings={"method": "seqkd"}, cells={"a": {}})

    class Downloads(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            if not self.commands:
                swap_two_tokens(tmp_path / "pair/student/tokenizer.json")
            return super().__call__(arguments)

    launcher = Downloads()
    with pytest.raises(CellFailed, match="a-seed1 could not start: teacher and student have different tokenizers"):
        compare(path, tmp_path / "out", launch=launcher, say=lambda _: None)
    assert [c[0] for c in launcher.commands] == ["distill"] and not (tmp_path / "out/runs/a-seed1").exists()


def test_what_is_measured_against_another_teacher_or_lost_is_measured_anew(tmp_path: Path, finished):
    path, out = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    before = finished[2]
    # As if a later cell had been scored against another teacher: its responses are marked, the others' distances not.
    (out / "eval/models/gkd-seed1/teacher.txt").write_text("another\n")
    (out / "eval/models/sft-seed1/questions.jsonl").unlink()
    launcher = Launcher()
    after = compare(path, out, launch=launcher, say=lambda _: None)
    assert launcher.kinds() == ["eval gkd-seed1", "eval sft-seed1"] and after["sets"] == before["sets"]


def test_the_table_says_which_cells_were_trained_on_what_they_are_asked(tmp_path: Path, finished):
    path, out = finished[0], tmp_path / "out"
    shutil.copytree(finished[1], out)
    kept = out / "eval/sets/questions.json"
    content = json.loads(kept.read_text(encoding="utf-8"))
    cells = dict.fromkeys(("switch-seed1", "gkd-seed1", "sft-seed1"), 0)
    assert content["overlaps_with_training"] == cells and content["left_out"] == 0, "each by an evaluation of its own"

    def table(**changes: Any) -> str:
        kept.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}), encoding="utf-8")
        compare(path, out, launch=Launcher(stop_at=0), say=lambda _: None)
        return (out / "results.md").read_text(encoding="utf-8")

    seen = cells | {"switch-seed1": 2, "gkd-seed1": 2, "gone-seed1": 3}
    text = table(overlaps_with_training=seen, left_out=4)
    assert (
        "## questions (5 records, 4 left out)\n\n2 of 5 prompts are also in the training data of switch, gkd," in text
    )
    earlier = table(overlaps_with_training=None, left_out=None)
    assert "## questions (5 records)\n" in earlier and "training data of" not in earlier


def test_another_evaluation_of_the_same_runs_trains_nothing(tmp_path: Path, finished):
    folder, out = finished[0].parent, shutil.copytree(finished[1], tmp_path / "out")
    evaluate = {"data": [str(folder / "questions.jsonl")], "max_new_tokens": 8, "limit": 4}
    path = write_comparison(folder, "shorter", evaluate=evaluate)
    with pytest.raises(RunDirError, match=r"scored with other settings \(evaluate.limit\).*the runs stay"):
        compare(path, out, launch=Launcher(), say=lambda _: None)
    shutil.rmtree(out / "eval")
    for file in (out / "cells").glob("*.json"):
        if not file.name.endswith(".start.json"):
            file.unlink()
    launcher = Launcher()
    results = compare(path, out, launch=launcher, say=lambda _: None)
    assert {c[0] for c in launcher.commands} == {"eval"} and results["sets"]["questions"]["records"] == 4


def test_data_without_responses_has_no_sft_row_and_other_failures_stop(tmp_path: Path):
    path = write_comparison(tmp_path, cells={"switch": {}})
    lines = [{"prompt": f"tell {i}"} for i in range(len(WORDS))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = compare(path, tmp_path / "out", launch=Launcher(), say=lambda _: None)
    assert "sft-seed1 could not start" in results["failed"]["sft-seed1"]
    assert set(results["sets"]["questions"]["models"]) == {"switch", "teacher", "untrained"}

    # Refused before it begins for another reason, it is missed; so is a run that fails later.
    class Refused(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            return 2 if "sft-seed1" in " ".join(arguments) else super().__call__(arguments)

    refused = tmp_path / "refused"
    refused.mkdir()
    with pytest.raises(CellFailed, match="training of sft-seed1 ended with code 2"):
        compare(
            write_comparison(refused, cells={"switch": {}}), tmp_path / "out3", launch=Refused(), say=lambda _: None
        )

    class Broken(Launcher):
        def __call__(self, arguments: Sequence[str]) -> int:
            code = super().__call__(arguments)
            return 2 if "sft-seed1" in " ".join(arguments) else code  # as out of memory in its third step

    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CellFailed, match="training of sft-seed1 ended with code 2"):
        compare(write_comparison(other), tmp_path / "out2", launch=Broken(), say=lambda _: None)


def test_two_commands_do_not_write_into_one_folder(tmp_path: Path, capsys):
    from qswitch.run_dir import locked

    path, out = write_comparison(tmp_path), tmp_path / "out"
    out.mkdir()
    with locked(out):
        assert cli.run(["compare", str(path), "--output-dir", str(out)]) == 2
    assert "Another qswitch command is writing to" in capsys.readouterr().err
    run_path = tmp_path / "run"
    train = ["distill", "--config", str(tmp_path / "base.yaml"), "--set", "train.max_steps=2", "--set",
             "train.eval_steps=2"]  # fmt: skip
    assert cli.run([*train, "--output-dir", str(run_path)]) == 0
    asked = ["eval", str(run_path), "--data", str(tmp_path / "questions.jsonl"), "--no-teacher", "--limit", "1"]
    assert cli.run(asked) == 0
    with locked(run_path), locked(run_path / "eval/greedy"):
        assert cli.run(["distill", "--resume", str(run_path)]) == 2 and cli.run(asked) == 2
    assert cli.run(asked) == 0


def test_finished_cells_without_their_runs_keep_their_controls(tmp_path: Path, finished, capsys):
    path, out = finished[0], shutil.copytree(finished[1], tmp_path / "out")
    before = finished[2]
    shutil.rmtree(out / "runs")
    launcher = Launcher()
    assert compare(path, out, launch=launcher, say=lambda _: None) == before and not launcher.commands
    shutil.rmtree(out / "eval/models/untrained")
    with pytest.raises(CellFailed, match=r"control untrained .* Delete .*switch-seed1.json"):
        compare(path, out, launch=launcher, say=lambda _: None)
    (out / "cells/switch-seed1.json").unlink()
    assert list(compare(path, out, launch=launcher, say=lambda _: None)["sets"]["questions"]["models"]) == list(
        before["sets"]["questions"]["models"]
    )


def test_what_evaluate_says_reaches_every_evaluation(tmp_path: Path):
    evaluate = {"data": [str(tmp_path / "questions.jsonl")], "max_new_tokens": 6, "limit": 3, "split": "validation",
                "device": "cpu", "batch_size": 2}  # fmt: skip
    launcher = Launcher()
    path = write_comparison(tmp_path, evaluate=evaluate)
    compare(path, tmp_path / "out", launch=launcher, say=lambda _: None)
    evaluations = [" ".join(c) for c in launcher.commands if c[0] == "eval"]
    assert len(evaluations) == 5, "three cells and two controls"
    for words in evaluations:
        assert "--split validation --batch-size 2 --device cpu" in words and "--max-new-tokens 6 --limit 3" in words
    settings = read_comparison(tmp_path / "study.yaml").cells[0].settings
    assert settings["evaluate.split"] == "validation" and "evaluate.device" not in settings


def test_a_cell_is_a_process_of_its_own(tmp_path: Path, monkeypatch):
    """The default launcher starts `qswitch` itself and hands its exit code back."""
    from qswitch.compare.cells import launch_process

    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.txt"))
    assert launch_process(["presets", "list"]) == 0 and not (tmp_path / "error.txt").exists()
    assert launch_process(["presets", "show", "nothing"]) == 2
    assert "nothing" in (tmp_path / "error.txt").read_text(encoding="utf-8"), "why, for compare to say at its end"


def test_the_process_that_waits_holds_no_gpu():
    """A CUDA context takes hundreds of MiB; the comparing process never loads torch."""
    import subprocess
    import sys

    code = "import qswitch.compare.cells, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr

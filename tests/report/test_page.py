"""The page of a run: complete, offline, safe against what models and users write."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qswitch.cli import run
from qswitch.errors import RunDirError
from qswitch.evaluate.marks import TrainedWeights
from qswitch.layers import build_config
from qswitch.report import page as page_module
from qswitch.report.page import render_page, write_report
from qswitch.report.read import facts, figures, names_of
from qswitch.report.svg import Series, line_chart
from qswitch.run_dir import RunDir

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects attributes and fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def checked(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert not checker.open, checker.open
    return checker


def make_run(folder: Path, *, hostile: str = "", finished: bool = True) -> RunDir:
    config = build_config({"teacher": {"model": "big/teacher"}, "student": {"model": "small/student"},
                           "data": {"train": "x.jsonl"}, "about": {"description": hostile}})  # fmt: skip
    run_dir = RunDir.create(folder, config)
    run_dir.write_json("plan.json", {"total_gib": 2.5, "budget_gib": 8.0, "parts": {"teacher_weights": 1.5, "x": 0.0},
                                     "phases": {"train": 2.5}, "notes": ["a note"]})  # fmt: skip
    for step in range(1, 5):
        run_dir.append_metrics(
            {"step": step, "loss": 1.0 / step, "batch": "rollout", "teacher_share": 0.5, "jsd_bits": 0.25,
             "rollout_tokens": 100, "loss_tokens": 50, "rollout_tokens_per_s": 10.0, "peak_gib": 2.0 + step / 10,
             "phases_gib": {"train": {"planned": 2.5, "allocated": 1.0 + step / 8, "reserved": 2.25}},
             "seconds": {"rollout": 3.0, "loss": 1.0}}
        )  # fmt: skip
    run_dir.append_metrics({"step": 4, "kl_nats": 0.5})
    tokens = [
        {"text": "Hello " + hostile, "writer": "student", "jsd": 0.1, "tau": 0.9, "student": "Hello " + hostile,
         "teacher": "Hi" + hostile},
        {"text": "there", "writer": "teacher", "jsd": 0.8, "tau": 0.4, "student": "friend", "teacher": "there"},
        {"text": ".", "writer": "teacher", "jsd": 0.7, "tau": None, "student": None, "teacher": "."},
        {"text": "\n", "writer": "student", "jsd": 0.3, "tau": 0.35, "student": "\n", "teacher": None},
    ]  # fmt: skip
    one = {"text": hostile, "ended": True}
    after = one if finished else None
    answers = [
        {"prompt": f"Question {i} {hostile}", "before": one | {"text": f"before {i}"}, "after": after,
         "reference": {"text": f"reference {i}", "ended": False}}
        for i in range(6)
    ]  # fmt: skip
    run_dir.write_json("held_out.json", {"figure": "kl_nats", "reference": "teacher", "answers": answers,
                                         "tokens": [10, 20, 30], "before_nats": [1.0, 2.0, 2.5],
                                         "after_nats": [0.4, 0.5, 0.6]})  # fmt: skip
    for step in range(1, 31):
        run_dir.append_rollouts([{"step": step, "prompt": "Say " + hostile, "tokens": tokens}])
    if finished:
        summary = {"kl_before_nats": 2.0, "kl_after_nats": 0.5, "peak_gib": 2.4, "device": "cuda"}
        run_dir.write_json("summary.json", summary | {"versions": {"torch": "2.13"}, "commit": "abc123"})
    return run_dir


def test_the_page_shows_what_the_run_did(tmp_path: Path, capsys):
    run_dir = make_run(tmp_path / "run")
    assert run(["report", str(run_dir.path)]) == 0
    page = checked(run_dir.path / "report.html")
    text = " ".join("".join(page.text).split())
    pieces = [
        *("before2.000", "after0.500", "-75%", "4 of 200", "planned2.50", "measured peak2.40", "a note"),
        *("phaseplanned, GiBallocated, GiBreserved, GiB", "train2.5001.5002.250"),
        *("teacher weights", "24 of the 30 rollouts", "50 % by the teacher", "abc123", "rollout12 s"),
    ]
    for piece in pieces:
        assert piece in text, piece
    writers = [value for name, value in page.attributes if name == "class" and value and value.startswith("w ")]
    assert writers == ["w student", "w teacher", "w teacher", "w student break"] * 24
    assert ("data-threshold", "0.900") in page.attributes and ("data-teacher", "there") in page.attributes
    assert text.index("Question 0") < text.index("-75%"), "answers lead the page"
    assert "3 more" in text and "reference 5 …" in text and "reference 0" in text


def test_intervals_stand_beside_the_figures(tmp_path: Path):
    text = " ".join("".join(checked(write_report([make_run(tmp_path / "run").path])).text).split())
    before, after, change = re.search(
        r"before2.000([\d.]+ to [\d.]+)after0.500([\d.]+ to [\d.]+)change-75%(\S+ to \S+%)", text
    ).groups()
    # Every resample of the three prompts lies between the least and the largest of them.
    for interval, low, high in ((before, 1.0, 2.5), (after, 0.4, 0.6)):
        least, most = map(float, interval.split(" to "))
        assert low <= least < most <= high
    least, most = (float(x.rstrip("%")) for x in change.split(" to "))
    assert -76 <= least < most <= -60, "paired: one prompt fell by 60 %, the others by 75 and 76 %"


def test_the_page_needs_no_network_and_runs_one_script_of_ours(tmp_path: Path):
    path = write_report([make_run(tmp_path / "run").path])
    page = checked(path)
    assert not page.tags & {"link", "img", "iframe", "object", "embed", "base"}
    assert not [a for a in page.attributes if a[0] in ("src", "href", "srcset", "action") or a[0].startswith("on")]
    source = path.read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source and "url(" not in source
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in source and f"script-src 'sha256-{digest}'" in source
    assert "innerHTML" not in script and "eval" not in script


def test_what_models_and_users_write_stays_text(tmp_path: Path):
    hostile = "</div><script>alert(1)</script><img src=x onerror=y> {{ 7 * 7 }} \" ' & \u2028"
    page = checked(write_report([make_run(tmp_path / "run", hostile=hostile).path]))
    assert page.scripts == 1 and "img" not in page.tags
    assert "".join(page.text).count(hostile) >= 24
    assert sum(hostile in (value or "") for name, value in page.attributes if name.startswith("data-")) == 48


def test_several_runs_share_a_page(tmp_path: Path, capsys):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", finished=False)]
    output = tmp_path / "both.html"
    assert run(["report", *(str(r.path) for r in runs), "--output", str(output)]) == 0
    page = checked(output)
    ids = [value for name, value in page.attributes if name == "id"]
    assert [i for i in ids if i.startswith("run-")] == ["run-1", "run-2"]
    assert {value for name, value in page.attributes if name == "aria-controls"} == {"run-1", "run-2"}
    text = " ".join("".join(page.text).split())
    assert text.startswith("first, second") and "second not finished" in text
    source = output.read_text(encoding="utf-8")
    assert "first: 2 at 0</title>" in source and "second: 0.5 at 4</title>" in source, "both curves on one chart"


def test_an_unfinished_and_an_empty_run_give_a_page(tmp_path: Path):
    text = "".join(checked(write_report([make_run(tmp_path / "a", finished=False).path])).text)
    assert "has not finished" in text and "measured peak2.40" in " ".join(text.split())
    config = build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "x"}})
    checked(write_report([RunDir.create(tmp_path / "b", config).path]))
    with pytest.raises(RunDirError, match="does not exist"):
        write_report([tmp_path / "nowhere"])


def test_evaluations_of_the_run_are_shown(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    folder = run_dir.path / "eval" / "paper"
    folder.mkdir(parents=True)
    interval = {"mean": 12.5, "low": 11.0, "high": 14.0, "records": 9}
    one: dict[str, Any] = {"metrics": {"rouge_l": {"all": interval}}, "response_tokens": 33.0}
    results = {"protocol": {"name": "paper"}, "departures": ["seeds is (1,)"],
               "sets": {"dolly": {"records": 9, "models": {"run": one}}}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = "".join(checked(write_report([run_dir.path])).text)
    assert "12.50 [11.00, 14.00]" in text and "dolly, protocol paper, 9 records" in text and "seeds is (1,)" in text


def evaluated(run_dir: RunDir, weights: dict[str, Any] | None, **more: Any) -> str:
    """The page of a run that was evaluated with these weights, as text."""
    folder = run_dir.path / "eval" / "greedy"
    folder.mkdir(parents=True, exist_ok=True)
    one = {"metrics": {}, "response_tokens": 33.0}
    results = {"protocol": {"name": "greedy"}, "sets": {"dolly": {"records": 9, "left_out": 2, "models": {"run": one}}}}
    results |= more | ({} if weights is None else {"weights": weights})
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return " ".join("".join(checked(write_report([run_dir.path])).text).split())


def test_an_evaluation_of_weights_that_the_run_no_longer_has_is_marked(tmp_path: Path):
    run_dir = make_run(tmp_path / "run", finished=False)
    saved = run_dir.checkpoints_path / "step-000300" / "adapter"
    saved.mkdir(parents=True)
    (saved / "adapter_model.safetensors").write_bytes(b"early")
    student, base = TrainedWeights.of(run_dir, saved).to_dict(), {"fingerprint": "y", "trained": None}
    weights = {"run": {"fingerprint": "x", "trained": student}, "base": base}
    assert "other weights" not in evaluated(run_dir, weights)

    run_dir.adapter_path.mkdir()
    (run_dir.adapter_path / "adapter_model.safetensors").write_bytes(b"early")
    run_dir.write_json("summary.json", {"best_step": 300})
    assert "other weights" not in evaluated(run_dir, weights), "the checkpoint became the result of the run"

    (run_dir.adapter_path / "adapter_model.safetensors").write_bytes(b"later")
    run_dir.write_json("summary.json", {"best_step": 900})
    text = evaluated(run_dir, weights)
    assert (
        "run: the weights of step 300; the run had not finished" in text
        and "Now it has the weights of step 900" in text
    )
    assert "other weights" not in evaluated(run_dir, {"base": base}), "no student was measured"
    assert "did not keep which weights" in evaluated(run_dir, None), "of an earlier version"

    run_dir.write_json("fidelity.json", {"precisions": [], "reference": {"precision": "bf16"}, "prompts": 7,
                                         "origin": None, "student_weights": student})  # fmt: skip
    (run_dir.path / "eval/greedy/results.json").unlink()
    text = " ".join("".join(checked(write_report([run_dir.path])).text).split())
    assert "the student: the weights of step 300" in text


def test_prompts_that_were_trained_on_or_left_out_are_named_beside_the_scores(tmp_path: Path):
    text = evaluated(make_run(tmp_path / "run"), None, overlaps_with_training={"dolly": {"run": 4, "other": 0}})
    assert "9 records, 2 left out" in text
    assert "4 of 9 prompts are also in the training data of run, whose scores" in text


def test_gib_that_an_earlier_version_counted_on_a_cpu_say_so(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    values = {"precisions": [], "reference": {"precision": "bf16"}, "prompts": 7, "origin": None, "device": "cpu"}
    for more, said in (
        ({}, "as a CPU holds them"),
        ({"weights_counted": "in one way"}, "Weights are counted in one way."),
    ):
        run_dir.write_json("fidelity.json", values | more)
        assert said in "".join(checked(write_report([run_dir.path])).text)


def test_fidelity_of_the_run_is_shown(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    interval = {"mean": 0.25, "low": 0.2, "high": 0.3, "records": 9}
    one = {"precision": "nf4", "weights_gib": 1.5, "kl_nats": interval, "top1_agreement": interval,
           "reference_intervention_share": 0.5, "intervention_share": 0.6, "changed_decisions": interval}  # fmt: skip
    result = {"precisions": [one], "reference": {"precision": "bf16"}, "prompts": 7,
              "origin": "Dequantised from x.gguf."}  # fmt: skip
    run_dir.write_json("fidelity.json", result | {"doubt": "Others were held out."})
    text = "".join(checked(write_report([run_dir.path])).text)
    assert "against bf16, 7 prompts" in text and "Others were held out." in text
    run_dir.write_json("fidelity.json", result)
    text = "".join(checked(write_report([run_dir.path])).text)
    assert "50.0% → 60.0%" in text and "against bf16, 7 held-out prompts" in text and "Dequantised from x.gguf." in text


def test_the_curve_of_kl_starts_before_the_first_step(tmp_path: Path):
    source = write_report([make_run(tmp_path / "run").path]).read_text(encoding="utf-8")
    assert ": 2 at 0</title>" in source and ": 0.5 at 4</title>" in source


def test_what_the_teacher_made_of_the_students_own_text_stands_below_the_other_figures():
    own = {"reverse_kl_nats": 2.0, "responses": 8, "length_ratio": 1.5, "ended_share": 0.5, "repeated_4grams": 0.25}
    after = {**own, "reverse_kl_nats": 1.5, "length_ratio": 1.02, "ended_share": 0.875}
    summary = {"kl_before_nats": 1.0, "kl_after_nats": 0.5, "validation_prompts": 32, "own_before": own}
    assert len(figures(summary, {})) == 1, "a run that has not ended has no figures to set beside"
    found = figures({**summary, "own_after": after}, {})
    assert [(one.before, one.after, one.change) for one in found[1:]] == [
        ("2.000", "1.500", "-25%"), ("150%", "102%", ""), ("50%", "88%", ""), ("25%", "25%", "")
    ]  # fmt: skip
    assert "8 of the prompts" in found[1].label


def test_only_figures_with_a_direction_are_called_better_or_worse(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    own = {"reverse_kl_nats": 2.0, "responses": 8, "length_ratio": 1.5, "ended_share": 0.5, "repeated_4grams": 0.25}
    summary = json.loads(run_dir.summary_path.read_text(encoding="utf-8"))
    run_dir.write_json("summary.json", summary | {"own_before": own, "own_after": own | {"reverse_kl_nats": 2.5}})
    text = " ".join("".join(checked(write_report([run_dir.path])).text).split())
    for label, directed in (
        ("on what the teacher wrote to the held-out prompts", True), ("of the prompts", True), ("Length, of", False),
        ("Ended before", False), ("Repeated 4-grams", False),
    ):  # fmt: skip
        sentence = text[text.index(label) :].partition(".")[0]
        assert sentence.endswith("; lower is better") == directed, sentence
    found = figures(json.loads(run_dir.summary_path.read_text(encoding="utf-8")), {})
    assert [one.judgement for one in found] == ["better", "worse", "", "", ""]


def test_figures_of_different_kinds_are_told_apart_where_runs_are_compared(tmp_path: Path):
    runs = [make_run(tmp_path / "switch"), make_run(tmp_path / "sft")]
    runs[1].write_json("summary.json", {"response_loss_before_nats": 5.0, "response_loss_after_nats": 4.7})
    source = render_page(runs)
    rows = re.findall(r"<tr><td>(switch|sft)</td>\s*<td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", source)
    assert [(name, html.unescape(kind), before, after) for name, kind, before, after in rows] == [
        ("switch", "KL(teacher ‖ student)", "2.000", "0.500"), ("sft", "loss on the teacher's text", "5.000", "4.700")
    ]  # fmt: skip


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path):
    runs = [RunDir.open(make_run(tmp_path / name).path) for name in ("a/run", "b/run", "b/other")]
    assert names_of(runs) == ["a/run", "b/run", "other"] and names_of(runs[:1]) == ["run"]
    text = "".join(checked(write_report([run.path for run in (*runs, runs[0])], tmp_path / "all.html")).text)
    assert text.strip().startswith("a/run, b/run, other ·"), "a run that is named twice is shown once"


def test_every_series_of_a_chart_can_be_seen_and_looks_different():
    series = [Series(f"run {i}", [(0, i), (1, i + 1)], dots=True) for i in range(24)]
    chart = line_chart(series, x_label="step", y_label="nats")
    looks = re.findall(r'class="line ([^"]*)"', chart)
    assert len(set(looks)) == 24 and looks == re.findall(r'class="key ([^"]*)"', chart)
    style = (Path(page_module.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    for name in {name for look in looks for name in look.split()}:
        rules = [f".{name} {{ --s:"] if name[0] == "s" else [f".line.{name} {{", f".key.{name} {{"]
        assert all(rule in style for rule in rules), name


def test_the_limit_of_steps_is_shown_where_it_is_the_budget_and_shares_weigh_by_tokens(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    run_dir.append_metrics({"step": 5, "loss": 0.2, "teacher_share": 1.0, "rollout_tokens": 600})
    lines = run_dir.read_metrics()

    def shown(**limits: Any) -> dict[str, str]:
        train = run_dir.config.train.model_copy(update=limits)
        run_dir.config = run_dir.config.model_copy(update={"train": train})
        return dict(facts({}, lines, run_dir))

    assert shown()["steps"] == "5 of 200" and "budget" not in shown()
    assert shown()["written by the teacher"] == "80%", "(4 x 100 x 0.5 + 600) of 1,000 tokens"
    by_tokens = shown(max_tokens=20_000, max_steps=1_000_000)
    assert (by_tokens["steps"], by_tokens["budget"]) == ("5", "20,000 response tokens")
    assert shown(max_steps=7)["steps"] == "5 of 7", "either would end it"

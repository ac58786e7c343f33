"""The page of a run: complete, offline, safe against what models and users write."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qswitch.cli import run
from qswitch.errors import RunDirError
from qswitch.layers import build_config
from qswitch.report.page import position_charts, write_report
from qswitch.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart
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

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
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
             "seconds": {"rollout": 3.0, "loss": 1.0}}
        )  # fmt: skip
    run_dir.append_metrics({"step": 4, "kl_nats": 0.5})
    tokens = [
        {"text": "Hello " + hostile, "writer": "student", "jsd": 0.1, "tau": 0.9},
        {"text": "there", "writer": "teacher", "jsd": 0.8, "tau": 0.4},
        {"text": ".", "writer": "teacher", "jsd": 0.7, "tau": 0.3},
    ]
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
        *("before 2.000", "after 0.500", "-75%", "4 of 200", "planned 2.50", "measured peak 2.40", "a note"),
        *("teacher weights", "12 of the 30 rollouts", "67 % by the teacher", "abc123", "rollout 75%"),
    ]
    for piece in pieces:
        assert piece in text, piece
    writers = [value for name, value in page.attributes if name == "class" and value and value.startswith("w ")]
    assert writers == ["w student", "w teacher"] * 12, "neighbours of one writer are joined"
    assert text.count("Hello there.") == 12


def test_the_page_needs_no_network_and_runs_no_script(tmp_path: Path):
    path = write_report(make_run(tmp_path / "run").path)
    page = checked(path)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not [a for a in page.attributes if a[0] in ("src", "href", "srcset", "action") or a[0].startswith("on")]
    source = path.read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source and "url(" not in source
    assert "default-src 'none'" in source


def test_what_models_and_users_write_stays_text(tmp_path: Path):
    hostile = "</div><script>alert(1)</script><img src=x onerror=y> {{ 7 * 7 }} \" ' & \u2028"
    page = checked(write_report(make_run(tmp_path / "run", hostile=hostile).path))
    assert "script" not in page.tags and "img" not in page.tags
    assert "".join(page.text).count(hostile) >= 24


def test_an_unfinished_and_an_empty_run_give_a_page(tmp_path: Path):
    text = "".join(checked(write_report(make_run(tmp_path / "a", finished=False).path)).text)
    assert "has not finished" in text and "measured peak 2.40" in " ".join(text.split())
    config = build_config({"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "x"}})
    checked(write_report(RunDir.create(tmp_path / "b", config).path))
    with pytest.raises(RunDirError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_evaluations_of_the_run_are_shown(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    folder = run_dir.path / "eval" / "paper"
    folder.mkdir(parents=True)
    interval = {"mean": 12.5, "low": 11.0, "high": 14.0, "records": 9}
    one: dict[str, Any] = {"metrics": {"rouge_l": {"all": interval}}, "response_tokens": 33.0}
    results = {"protocol": {"name": "paper"}, "departures": ["seeds is (1,)"],
               "sets": {"dolly": {"records": 9, "models": {"run": one}}}}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    text = "".join(checked(write_report(run_dir.path)).text)
    assert "12.50 [11.00, 14.00]" in text and "dolly, protocol paper, 9 records" in text and "seeds is (1,)" in text


def test_fidelity_of_the_run_is_shown(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    interval = {"mean": 0.25, "low": 0.2, "high": 0.3, "records": 9}
    one = {"precision": "nf4", "weights_gib": 1.5, "kl_nats": interval, "top1_agreement": interval,
           "reference_intervention_share": 0.5, "intervention_share": 0.6, "changed_decisions": interval}  # fmt: skip
    run_dir.write_json("fidelity.json", {"precisions": [one], "reference": {"precision": "bf16"}, "prompts": 7,
                                         "origin": "Dequantised from x.gguf."})  # fmt: skip
    text = "".join(checked(write_report(run_dir.path)).text)
    assert "50.0% → 60.0%" in text and "against bf16, 7 held-out prompts" in text and "Dequantised from x.gguf." in text


def test_the_curve_of_kl_starts_before_the_first_step(tmp_path: Path):
    source = write_report(make_run(tmp_path / "run").path).read_text(encoding="utf-8")
    assert ": 2 at 0</title>" in source and ": 0.5 at 4</title>" in source


def points(svg: str) -> list[tuple[float, float]]:
    found = re.search(r'points="([^"]*)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_a_chart_puts_points_where_they_belong():
    svg = line_chart([Series("a", [(0, 0.0), (5, 0.5), (10, 1.0)])], x_label="x", y_label="y", y_range=(0, 1))
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    assert points(svg) == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]


@pytest.mark.parametrize(
    "values", [[3.0], [5.0, 5.0], [0.0, 0.0], [-2.0, 7.5], [1e-9, 2e-9], [1234567.0, 1234568.0], [0.93, 1.07]]
)
def test_every_point_is_inside_the_axes_and_the_markup_is_well_formed(values):
    series = Series('<"&>', list(enumerate(values)), dots=True)
    svg = line_chart([series, Series("b", [(0, values[0])])], x_label="<x>", y_label="y & z")
    for x, y in points(svg):
        assert LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
    ElementTree.fromstring(f"<div>{svg}</div>")


def test_no_finite_point_gives_no_chart():
    assert line_chart([Series("a", [(0, math.nan), (1, math.inf)])], x_label="x", y_label="y") == ""


def test_shares_by_position_are_means_over_the_rollouts_that_reach_it():
    def rollout(writers: str) -> dict:
        return {"tokens": [{"text": "a", "writer": {"s": "student", "t": "teacher"}[w], "jsd": 0.5} for w in writers]}

    share, divergence = position_charts([rollout("st"), rollout("tt"), rollout("t")])
    bottom, top = HEIGHT - BOTTOM, TOP
    height = bottom - top
    (_, first), (_, second) = points(share.svg)
    assert first == pytest.approx(bottom - height * 2 / 3, abs=0.1) and second == pytest.approx(top)
    assert "3 rollouts" in share.note and "threshold" not in divergence.svg
    assert position_charts([{"tokens": [{"text": "a", "writer": "teacher", "jsd": None}]}]) == []

"""Tasks of EleutherAI's harness, an optional extra."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qswitch.cli import run
from qswitch.errors import DataError
from qswitch.evaluate.harness import run_tasks
from qswitch.evaluate.subjects import find_subject
from tests.evaluate.runs import make_run, write_test_set
from tests.extras import extra


def test_without_the_harness_nothing_starts_and_the_remedy_is_named(tmp_path: Path, capsys, monkeypatch):
    run_path = make_run(tmp_path).path
    data = write_test_set(tmp_path / "questions.jsonl")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    out = tmp_path / "out"
    assert run(["eval", str(run_path), "--data", str(data), "--lm-eval", "arc_easy", "--output-dir", str(out)]) == 2
    assert "pip install '.[lm-eval]'" in capsys.readouterr().err and not out.exists()


def test_finished_scores_are_not_asked_again(tmp_path: Path, monkeypatch):
    run_path = make_run(tmp_path).path
    data = write_test_set(tmp_path / "questions.jsonl")
    asked: list[str] = []

    def score(subject, tasks, **options):
        asked.append(subject.name)
        if len(asked) == 2:
            raise DataError("the hub cannot be reached")
        return {tasks[0]: {"acc": 0.25 * len(asked)}}

    monkeypatch.setattr("qswitch.evaluate.harness.require_harness", lambda: None)
    monkeypatch.setattr("qswitch.evaluate.harness.run_tasks", score)
    arguments = ["eval", str(run_path), f"{run_path}:base", "--data", str(data), "--lm-eval", "arc_easy", "--limit",
                 "2", "--max-new-tokens", "4", "--no-teacher", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert run(arguments) == 2
    assert run(arguments) == 0
    assert asked == ["run", "run-base", "run-base"]
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert results["lm_eval"] == {"run": {"arc_easy": {"acc": 0.25}}, "run-base": {"arc_easy": {"acc": 0.75}}}
    # --limit shortens the tasks too, and whoever reads the scores must see it.
    assert results["limit"] == 2
    table = (tmp_path / "out/results.md").read_text(encoding="utf-8")
    assert "## lm-eval: run-base, the first 2 documents of a task\n" in table


def log_likelihoods(loaded: Any, question: str, choices: list[str]) -> list[float]:
    """Of each choice, behind a space after the question, in nats; one sequence at a time."""
    found = []
    for choice in choices:
        context, whole = (loaded.tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
        assert whole[: len(context)] == context
        with torch.no_grad():
            logits = loaded.model.hf(input_ids=torch.tensor([whole])).logits[0].double()
        steps = range(len(context), len(whole))
        found.append(float(sum(logits[t - 1].log_softmax(-1)[whole[t]] for t in steps)))
    return found


def test_a_task_is_scored_on_the_trained_student(tmp_path: Path, monkeypatch):
    """Five of eight documents have the choice as their answer that is likeliest by the model's own passes."""
    extra("lm_eval")
    subject = find_subject(str(make_run(tmp_path).path))
    documents = []
    for i in range(8):
        question, choices = f"say {i} and {i * i}", ["a", "bc", "d e"]
        scores = log_likelihoods(subject.load("cpu"), question, choices)
        assert len(set(scores)) == 3
        likeliest = scores.index(max(scores))
        answer = likeliest if i < 5 else (likeliest + 1) % 3
        documents.append({"question": question, "choices": choices, "answer": answer})
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    task = {
        "task": "tiny_task", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.json")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    path = tmp_path / "tiny_task.yaml"
    path.write_text(yaml.safe_dump(task))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    result = run_tasks(subject, [str(path)], limit=None, batch_size=2, device="cpu")
    assert result["tiny_task"]["acc,none"] == 5 / 8
    assert run_tasks(subject, [str(path)], limit=5, batch_size=2, device="cpu")["tiny_task"]["acc,none"] == 1
    with pytest.raises(DataError, match="no_such_task"):
        run_tasks(subject, ["no_such_task"], limit=None, batch_size=2, device="cpu")

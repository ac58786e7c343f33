"""What a finished run says at its end: of which step its adapter is, whether it got better, who wrote its batches."""

from __future__ import annotations

import json
from dataclasses import replace

from qswitch.console import print_summary
from qswitch.distill.adapter_card import WORSE
from qswitch.distill.session import doubts
from qswitch.run import distill
from qswitch.run_dir import RunDir
from tests.distill.test_trainer import folders
from tests.distill.test_training_by_method import with_method

__all__ = ["folders"]
FIGURES = ("kl", "response_loss")


def shown(run_dir, summary, capsys):
    capsys.readouterr()
    print_summary(run_dir, summary)
    return capsys.readouterr().out


def test_what_a_run_says_of_its_result(folders, tmp_path, capsys, caplog):
    """By DistiLLM from a student that nobody fine-tuned, at a rate that destroys it."""
    path = tmp_path / "run"
    changes = {"train__max_steps": 2, "train__eval_steps": 2, "train__learning_rate": 3.0, "train__eval_own_prompts": 0}
    summary = distill(with_method(folders, "distillm", **changes), path)
    assert summary.kl_after_nats > summary.kl_before_nats and summary.rollout_batches == 0
    warnings = [record.getMessage() for record in caplog.records if record.name == "qswitch.distill.session"]
    assert len(warnings) == 2
    assert "The student got worse" in warnings[0] and "that of step 2" in warnings[0]
    assert "The student wrote none of the 2 batches" in warnings[1] and "qswitch sft" in warnings[1]
    run_dir = RunDir.open(path)
    text = shown(run_dir, summary, capsys)
    rise = summary.kl_after_nats / summary.kl_before_nats - 1
    assert f"nats/token ({rise:.0%} higher)" in text and "lower" not in text
    assert "the student wrote 0 of 2 batches" in text and "of step" not in text.partition("adapter:")[2]
    card = (run_dir.adapter_path / "README.md").read_text()
    assert WORSE in card and "in 0 of 2 batches" in card and "2 steps." in card
    assert json.loads(run_dir.summary_path.read_text())["rollout_batches"] == 0

    # The same run as if it had been long, measured by its KL and by the loss on the data's responses.
    nothing = dict.fromkeys(f"{figure}_{when}_nats" for figure in FIGURES for when in ("before", "after", "last"))
    for figure in FIGURES:
        values = {f"{figure}_before_nats": 2.0, f"{figure}_after_nats": 1.0, f"{figure}_last_nats": 1.5}
        long = replace(summary, steps=900, best_step=100, **{**nothing, **values})
        text = shown(run_dir, long, capsys)
        assert "before 2.000   after 1.000 nats/token (50% lower)" in text
        assert "of step 100, the best validation; after step 900 it was 1.500" in text
        assert doubts(run_dir.config, replace(long, rollout_batches=1)) == []

"""What the first records say of a run and its plan: prompts that are too long, missing answers, how many steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qswitch.choose import choose
from qswitch.cli import run
from qswitch.data.first_look import first_look
from qswitch.layers import build_config
from qswitch.plan.render import duration
from qswitch.presets import load_run_config
from qswitch.run import preview
from tests.test_choose import TWO, named, pair

__all__ = ["pair"]

SHORT = "what can be said in so few words as these, one or two"  # 18 tokens at 3 bytes each, and the template's 32
LONG = "so many words of no meaning " * 70  # 1,960 characters: 654 tokens, and the template's


@pytest.mark.parametrize(
    ("limit", "num_long", "context", "advised"),
    [
        (256, 3, None, None),  # of 300 prompts: more than 95 % are kept already
        (64, 3, None, None),
        (32, 3, None, 64),
        (256, 30, None, 704),
        (256, 30, 960, 704),
        (256, 30, 959, None),  # which rollout.max_new_tokens=256 leaves no room for
        (256, 300, None, 704),
    ],
)
def test_a_limit_is_advised_only_where_it_keeps_more(tmp_path: Path, limit, num_long, context, advised):
    lines = [json.dumps({"prompt": LONG if i < num_long else f"{SHORT} {i}"}) for i in range(300)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    config = build_config(
        {"teacher": {"model": "t"}, "student": {"model": "s"}, "rollout": {"max_new_tokens": 256},
         "data": {"train": str(tmp_path / "p.jsonl"), "max_prompt_tokens": limit, "num_validation": 2}}
    )  # fmt: skip
    look = first_look(config, context)
    assert look is not None and look.num_too_long == num_long
    said = look.render()
    assert f"{num_long} of the 300 prompts are longer than data.max_prompt_tokens={limit}" in said
    if advised is None:
        longest = re.search(r"The longest has about (\d+) tokens\.$", said)
        assert longest is not None and 686 <= int(longest[1]) <= 690 and "--set" not in said
    else:
        assert said.endswith(f"For nearly all of them: --set data.max_prompt_tokens={advised}.")


def prompts(folder: Path, text: str, number: int = 300) -> str:
    lines = [json.dumps({"prompt": f"{i} {text}"}) for i in range(number)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return "prompts.jsonl"


@pytest.mark.parametrize("command", ["plan", "distill --dry-run", "sft --dry-run"])
def test_a_method_that_needs_answers_is_refused_by_every_plan(pair: Path, command: str, capsys):
    method = [] if command.startswith("sft") else ["--method", "gkd"]
    arguments = [*command.split(), *TWO, "--data", prompts(pair, "say"), *method, "--vram", "24GiB"]
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert "Fits" not in printed.out and "prompts.jsonl line 1 has none" in printed.err
    if method:
        assert "set data.ground_truth_mix=0" in printed.err
        assert run([*arguments, "--set", "data.ground_truth_mix=0"]) == 0


@pytest.mark.parametrize("command", ["plan", "distill --dry-run"])
def test_data_of_which_nothing_is_left_does_not_fit(pair: Path, command: str, capsys):
    ticket = "The printer on the second floor is out of paper again. " * 125  # 7,000 characters
    arguments = [*command.split(), *TWO, "--data", prompts(pair, ticket), "--vram", "24GiB"]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert "Fits" not in printed.out
    assert printed.out.startswith(
        "Nothing to train on: 300 of the 300 prompts are longer than data.max_prompt_tokens=1024"
    )
    assert "at most 1,024 are chosen, and longer prompts are left out" in printed.err
    assert "--set data.max_prompt_tokens" not in printed.out, "the models' context of 2,048 tokens holds none"
    for role in ("teacher", "student"):
        config = json.loads((pair / role / "config.json").read_text())
        (pair / role / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    assert run(arguments) == 0
    advised = re.search(r"--set (data.max_prompt_tokens=\d+)", capsys.readouterr().out)[1]
    assert run([*arguments, "--set", advised, "--set", "rollout.max_new_tokens=64"]) == 0
    assert capsys.readouterr().out.startswith("Fits")


def test_some_prompts_that_are_left_out_are_said(pair: Path, capsys):
    prompts(pair, "say")
    with (pair / "prompts.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"prompt": "long " * 3000}))
    assert run(["plan", *TWO, "--data", "prompts.jsonl", "--vram", "24GiB"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Fits") and "Left out: 1 of the 301 prompts" in printed
    assert "The longest has about 5,03" in printed and "--set data.max_prompt_tokens" not in printed
    assert run(["plan", *TWO, "--data", "prompts.jsonl", "--vram", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == {"records": 301, "too_long": 1, "is_whole": True}


def test_epochs_are_planned_as_the_steps_that_they_are(pair: Path, capsys):
    epochs = ["--set", "train.num_epochs=2", "--gpu", "rtx3060-12gb"]
    assert run(["plan", *TWO, "--data", prompts(pair, "say"), *epochs]) == 0
    printed = capsys.readouterr()
    assert " for about 34 steps (train.num_epochs=2 " in printed.out  # 2 x (300 - 30) / 16
    assert "train.warmup_steps=0.05" in printed.err and "train.max_steps" not in printed.err
    counted = preview(choose(named(**{"data.train": "prompts.jsonl", "train.num_epochs": 2}), vram="12GiB").config,
                      gpu="rtx3060-12gb").plan  # fmt: skip
    same = choose(named(**{"data.train": "prompts.jsonl", "train.max_steps": 34}), vram="12GiB").config
    assert counted.seconds == preview(same, gpu="rtx3060-12gb").plan.seconds
    assert (counted.config.train.num_epochs, counted.config.train.max_steps) == (2, 200), "the run counts for itself"

    assert run(["plan", "--preset", "qwen2.5-7b-to-1.5b", *epochs]) == 0  # Dolly, which is not here
    printed = capsys.readouterr().out
    assert "200 steps" not in printed and "1,000 training prompts are 125 steps" in printed
    plan = preview(load_run_config("qwen2.5-7b-to-1.5b", ["train.num_epochs=2"]), gpu="rtx3060-12gb").plan
    assert plan.seconds is None and plan.num_steps is None and f"about {duration(plan.step_seconds)} a step" in printed


def test_epochs_that_end_in_the_warm_up_are_refused_by_the_plan(pair: Path, capsys):
    few = ["--preset", "qwen2.5-7b-to-1.5b", "--data", prompts(pair, "say"), "--set", "train.num_epochs=1"]
    assert run(["plan", *few, "--gpu", "rtx3060-12gb"]) == 0, "the preset warms up over a share, however long it trains"
    few += ["--set", "train.warmup_steps=50"]
    assert run(["plan", *few, "--gpu", "rtx3060-12gb"]) == 2
    assert "is 15 steps with 240 training prompts, but train.warmup_steps is 50" in capsys.readouterr().err


def test_a_store_of_epochs_is_planned_by_its_prompts(pair: Path, capsys):
    teach = [
        "teach",
        *TWO,
        "--method",
        "seqkd",
        "--dry-run",
        "--vram",
        "24GiB",
        "--json",
        "--set",
        "train.num_epochs=2",
    ]
    assert run([*teach, "--data", prompts(pair, "say")]) == 0
    assert json.loads(capsys.readouterr().out)["sequences"] == 34 * 16 + 30
    (pair / "my.yaml").write_text("extends: qwen2.5-7b-to-1.5b\nmethod: seqkd\ntrain: {num_epochs: 2}\n")
    assert run(["teach", "--config", "my.yaml", "--dry-run", "--vram", "24GiB"]) == 0
    assert "where the data has 1,000 prompts to train on" in capsys.readouterr().out

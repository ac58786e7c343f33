"""A pair without a preset: what is chosen for it, that the printed command repeats it, and what is said where a name
is missing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from qswitch.choose import choose
from qswitch.cli import run
from qswitch.cli_options import Named, load_settings
from qswitch.config import known_keys, reader
from qswitch.errors import ConfigError
from qswitch.layers import by_section
from qswitch.presets import load_run_config


def model(folder: Path, *, layers: int, width: int, vocab: int = 32_000) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "vocab_size": vocab,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }))  # fmt: skip
    return folder


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A 7B teacher, a 1B student and 400 rows of a csv file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "teacher", layers=32, width=4096)
    model(tmp_path / "student", layers=22, width=2048)
    rows = [f'"{"why is it so? " * (1 + i % 20)}","because of {i}"' for i in range(400)]
    (tmp_path / "faq.csv").write_text("prompt,response\n" + "\n".join(rows) + "\n")
    return tmp_path


def named(**changes: object) -> dict:
    return by_section({"teacher.model": "teacher", "student.model": "student", "data.train": "faq.csv", **changes})


def test_lengths_steps_and_precision_follow_data_shapes_and_budget(pair: Path):
    small, large = choose(named(), vram="12GiB").config, choose(named(), vram="48GiB").config
    assert (small.teacher.precision, large.teacher.precision) == ("nf4", "bf16")
    # 19 x 14 characters are 89 tokens at 3 characters each, and the template's.
    assert small.data.max_prompt_tokens == 128 and small.rollout.max_new_tokens == 64
    assert small.data.num_validation == 40 and small.train.max_steps == 68  # 3 x 360 / 16
    assert small.train.warmup_steps == 3 and small.train.eval_steps == 6


def test_what_is_said_wins_and_is_not_among_the_choices(pair: Path):
    chosen = choose(named(**{"train.max_steps": 7, "teacher.precision": "int8"}), vram="12GiB")
    assert chosen.config.train.max_steps == 7 and chosen.config.teacher.precision == "int8"
    assert not {"train.max_steps", "teacher.precision"} & {choice.setting for choice in chosen.choices}


@pytest.mark.parametrize("method", [None, "gkd", "sft", "kd"])
def test_the_printed_command_repeats_the_run_on_another_budget(pair: Path, method: str | None):
    chosen = choose(named(**({"method": method} if method else {})), vram="12GiB")
    words = shlex.split(chosen.render("distill").rpartition("The same again: ")[2])
    assert words[:2] == ["qswitch", "distill"]
    options: dict[str, list[str]] = {}
    for name, value in zip(words[2::2], words[3::2], strict=True):
        options.setdefault(name, []).append(value)
    again = load_settings(
        Named(overrides=options["--set"], teacher=options["--teacher"][0], student=options["--student"][0],
              data=options["--data"]), vram="80GiB",
    )  # fmt: skip
    assert all(reader(again)(key) == reader(chosen.config)(key) for key in known_keys())


def test_names_and_sets_are_the_same_words(pair: Path, capsys: pytest.CaptureFixture[str]):
    by_name = ["plan", "--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--vram", "12GiB"]
    by_set = ["plan", "--set", "teacher.model=teacher", "--set", "student.model=student", "--set",
              "data.train=faq.csv", "--vram", "12GiB"]  # fmt: skip
    printed = []
    for command in (by_name, by_set):
        assert run([*command, "--json"]) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out and "Chosen for this pair" in printed[0].err
    assert json.loads(printed[0].out)["fits"]


def test_names_change_a_preset(pair: Path):
    config = load_settings(Named(preset="smollm2-demo", data=["faq.csv"], method="gkd"))
    preset = load_run_config("smollm2-demo")
    assert (config.data.train, config.method, config.train) == ("faq.csv", "gkd", preset.train)
    two = load_settings(Named(preset="smollm2-demo", data=["a.jsonl", "b.jsonl"]))
    assert two.data.train == ["a.jsonl", "b.jsonl"]


def test_sft_needs_one_model(pair: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["sft", "--student", "student", "--data", "faq.csv", "--dry-run", "--vram", "24GiB"]) == 0
    assert "qswitch sft --model student" in capsys.readouterr().err


def test_a_missing_student_is_answered_with_those_that_would_do(pair: Path):
    with pytest.raises(ConfigError) as caught:
        choose(by_section({"teacher.model": "Qwen/Qwen2.5-7B-Instruct", "data.train": "faq.csv"}))
    assert "Qwen/Qwen2.5-0.5B-Instruct (preset qwen2.5-7b-to-0.5b)" in str(caught.value)
    assert "--student shrink keeps two thirds of its 28 layers" in str(caught.value)
    model(pair / "unknown", layers=12, width=1024, vocab=1234)
    with pytest.raises(ConfigError, match=r"Cut one from the teacher: --student shrink keeps two thirds of its 12"):
        choose(by_section({"teacher.model": "unknown", "data.train": "faq.csv"}))


@pytest.mark.parametrize(("student", "layers"), [("shrink", 21), ("shrink:9", 9)])
def test_shrink_cuts_the_student_from_the_teacher(pair: Path, student: str, layers: int):
    chosen = choose(named(**{"student.model": student, "teacher.precision": "int8"}), vram="24GiB")
    assert (chosen.config.student.model, chosen.config.student.shrink_to_layers) == ("teacher", layers)
    assert ("student.shrink_to_layers" in {choice.setting for choice in chosen.choices}) == (student == "shrink")
    assert chosen.config.student.precision == "auto", "the cut is the teacher's, its precision is not"
    again = named(**{"student.model": "teacher", "student.shrink_to_layers": layers, "teacher.precision": "int8"})
    assert choose(again, vram="24GiB").config == chosen.config


def test_shrink_over_a_preset_cuts_the_teacher_of_the_preset(pair: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_settings(Named(preset="qwen2.5-7b-to-0.5b", student="shrink"))
    assert (config.student.model, config.student.shrink_to_layers) == (config.teacher.model, 18)
    assert config.student.shape == config.teacher.shape


def test_steps_are_counted_in_the_sequences_of_a_step(pair: Path):
    config = choose(named(**{"train.gradient_accumulation_steps": 1}), vram="12GiB").config
    assert config.train.max_steps == 270  # 3 x 360 / 4
    assert config.rollout.batch_size == 4


def test_a_model_of_a_preset_is_planned_without_the_hub(pair: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    own = named(**{"teacher.model": "Qwen/Qwen2.5-7B-Instruct", "student.model": "Qwen/Qwen2.5-0.5B-Instruct"})
    assert choose(own, vram="12GiB").config.teacher.shape["hidden_size"] == 3584


BAD = [
    ([], "--teacher MODEL --student MODEL --data FILE"),
    (["--teacher", "teacher"], "--data is missing"),
    (["--student", "student", "--data", "faq.csv"], "--teacher is missing"),
    (["--teacher", "teacher", "--data", "faq.csv"], "--student is missing"),
    (["--teacher", "teacher", "--student", "student"], "--data is missing"),
    (["--teacher", "nowhere", "--student", "student", "--data", "faq.csv"], "teacher.model"),
    (["--teacher", "teacher", "--student", "faq.csv", "--data", "faq.csv"], "student.model"),
    (["--teacher", "teacher", "--student", "student", "--data", "fqa.csv"], "Did you mean faq.csv"),
    (["--teacher", "teacher", "--student", "student", "--data", "teacher"], "teacher"),
    (["--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--method", "gdk"], "method = 'gdk'"),
    (["--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--set", "data.split=no"], "data.split"),
    (["--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--set", "train.max_step=3"], "max_steps?"),
    (["--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--set", "data.columns={prompt: x}"], "x"),
    (["--preset", "smollm2-demo", "--config", "a.yaml"], "either --preset"),
    (["--teacher", "package:nothing/x.gguf", "--student", "student", "--data", "faq.csv"], "nothing"),
    (["--set", "data.train=faq.csv"], "--teacher is missing"),
    (["--student", "shrink", "--data", "faq.csv"], "--teacher is missing"),
    (["--teacher", "teacher", "--student", "shrink:", "--data", "faq.csv"], "shrink:N with the number of layers"),
    (["--teacher", "teacher", "--student", "shrink:0", "--data", "faq.csv"], "shrink:N with the number of layers"),
    (["--teacher", "teacher", "--student", "shrink:half", "--data", "faq.csv"], "shrink:N with the number of layers"),
    (["--teacher", "teacher", "--student", "shrink:33", "--data", "faq.csv"], "the model has 32 layers"),
    (["--teacher", "teacher", "--student", "shrink:9", "--data", "faq.csv", "--set", "student.shrink_to_layers=9"],
     "once"),
    (["--preset", "smollm2-demo", "--student", "shrink:-1"], "shrink:N with the number of layers"),
    (["--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--set",
      "student.shrink_to_layers=99"], "has 22 layers"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_a_bad_name_is_one_message(pair: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert run(["plan", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1 and said in printed and "Traceback" not in printed


def test_a_resumed_run_takes_no_names(pair: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["distill", "--resume", "runs/x", "--teacher", "teacher"]) == 2
    assert "leave --preset" in capsys.readouterr().err

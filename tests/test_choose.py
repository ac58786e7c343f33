"""A pair without a preset: what is chosen for it, that the printed command repeats it, and what is said where a name
is missing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from qswitch.choose import Chosen, choose
from qswitch.cli import run
from qswitch.cli_options import Named, load_settings
from qswitch.config import RunConfig, TeacherSection, known_keys, reader
from qswitch.errors import ConfigError
from qswitch.layers import by_section, flatten
from qswitch.plan import model_files
from qswitch.plan.model_files import chat_template
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
    assert small.train.warmup_steps == 0.05 and small.train.eval_steps == 6


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


def again(chosen: Chosen) -> list[str]:
    return shlex.split(chosen.render("plan").rpartition("The same again: qswitch ")[2])


AWKWARD = [
    "You are helpful: be short.", "a # b", "yes", "007", "- x", "", " two  spaces ", "[a", "{not: a mapping}", "null",
    "größer\n\u2028 'x' \"y\"", "1e-4", "😀: " + "long " * 50,
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_is_printed_so_that_yaml_reads_it_again(pair: Path, text: str, capsys: pytest.CaptureFixture[str]):
    said = named(**{"data.system_prompt": text, "teacher.revision": "1234567", "teacher.model": ["nowhere", "teacher"],
                    "student.revision": "1e5"})  # fmt: skip
    arguments = again(choose(said, vram="12GiB"))
    assert run([*arguments, "--vram", "80GiB"]) == 0
    assert "Chosen for this pair; --set changes any of it:\nThe same again" in capsys.readouterr().err
    options = list(zip(arguments[1::2], arguments[2::2], strict=True))
    config = load_settings(
        Named(overrides=[value for option, value in options if option == "--set"], student="student", data=["faq.csv"])
    )
    assert config.data.system_prompt == text and config.teacher.model == ["nowhere", "teacher"]
    assert (config.teacher.revision, config.student.revision) == ("1234567", "1e5")


def test_several_files_are_named_again_one_by_one(pair: Path):
    (pair / "two files.csv").write_text((pair / "faq.csv").read_text())
    chosen = choose(named(**{"data.train": ["faq.csv", "two files.csv"]}), vram="12GiB")
    arguments = again(chosen)
    assert [arguments[i + 1] for i, word in enumerate(arguments) if word == "--data"] == ["faq.csv", "two files.csv"]
    assert run([*arguments, "--vram", "80GiB"]) == 0


CHINESE = "请用三句话解释为什么天空是蓝色的,并且给出一个简单的例子。谢谢"  # 50 tokens of SmolLM2, 20 of Qwen
HINDI = "आसमान नीला क्यों है, तीन वाक्यों में समझाइए"  # 49 of SmolLM2
RUSSIAN = "Объясни, почему небо голубое, в трёх предложениях"  # 42 of SmolLM2


@pytest.mark.parametrize(("text", "tokens"), [(CHINESE, 50), (HINDI, 49), (RUSSIAN, 42)])
def test_lengths_of_every_script_have_nearly_the_room_that_they_take(pair: Path, text: str, tokens: int):
    (pair / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i} {text * 8}"}) for i in range(300)))
    config = choose(named(**{"data.train": "p.jsonl"}), vram="24GiB").config
    assert 0.6 * tokens * 8 <= config.data.max_prompt_tokens <= 1.5 * tokens * 8


def test_a_long_second_file_counts_for_the_lengths(pair: Path):
    for name, words, number in (("short", 1, 6000), ("long", 300, 700)):
        lines = [json.dumps({"prompt": f"{i} " + "why " * words}) for i in range(number)]
        (pair / f"{name}.jsonl").write_text("\n".join(lines))
    config = choose(named(**{"data.train": ["short.jsonl", "long.jsonl"]}), vram="24GiB").config
    assert config.data.max_prompt_tokens == 448 and config.train.max_steps == 1000
    first = choose(named(**{"data.train": ["short.jsonl", "long.jsonl"], "data.limit": 300}), vram="24GiB").config
    assert first.data.max_prompt_tokens == 64 and first.train.max_steps == 51, "the first file alone is trained on"


def test_what_is_said_of_the_data_bounds_what_is_chosen_for_it(pair: Path, monkeypatch: pytest.MonkeyPatch):
    def hub(**said: object) -> dict:
        values = flatten(named(**{"data.train": "owner/data", **said}))
        return {choice.setting: choice.value for choice in choose(values, vram="24GiB").choices}

    assert hub()["train.max_steps"] == 1000 and hub()["train.warmup_steps"] == 0.05
    few = hub(**{"data.limit": 300})
    assert (few["data.num_validation"], few["train.max_steps"], few["train.eval_steps"]) == (30, 51, 5)
    epochs = hub(**{"data.limit": 300, "train.num_epochs": 1})  # 270 prompts are 17 steps
    assert (epochs["train.warmup_steps"], epochs["train.eval_steps"], epochs["train.save_steps"]) == (0.05, 1, 1)
    unknown = hub(**{"train.num_epochs": 1})
    assert unknown["train.warmup_steps"] == 0.05 and "train.eval_steps" not in unknown

    again_and_again = hub(**{"data.limit": 300, "rollout.reuse": 4})
    assert again_and_again["train.max_steps"] == 203, "three passes, of which each rollout trains 4 times: 3 x 270 / 4"
    night = hub(**{"data.limit": 300, "train.max_seconds": 28800})
    assert not {"train.max_steps", "train.eval_steps", "train.save_steps"} & set(night), "nobody knows the steps"
    for tokens, steps in ((10_000_000, 2442), (100_000, 25)):  # of 16 x 256
        for more in ({}, {"train.max_steps": 5000}, {"train.num_epochs": 1000}):
            found = hub(**{"data.limit": 300, "train.max_tokens": tokens, **more})
            assert found["train.eval_steps"] == found["train.save_steps"] == steps // 10, more
            assert "train.max_steps" not in found
    assert hub(**{"train.max_tokens": 100_000, "rollout.max_new_tokens": 25})["train.eval_steps"] == 25

    for said, chosen in (("data.max_prompt_tokens", "rollout.max_new_tokens"),
                         ("rollout.max_new_tokens", "data.max_prompt_tokens")):  # fmt: skip
        assert hub(**{said: 1900})[chosen] == 148, "of a context of 2048"
    config = choose(named(**{"rollout.max_new_tokens": 64}), vram="24GiB").config
    assert config.data.max_prompt_tokens == 128, "what the data needs"


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


def test_a_preset_cuts_another_student_only_with_a_word(pair: Path, capsys: pytest.CaptureFixture[str]):
    said = "--set student.shrink_to_layers=null keeps it whole"
    other = Named(preset="smollm2-demo", student="student", data=["faq.csv"])
    assert load_settings(other).student.shrink_to_layers == 22 and said in capsys.readouterr().err
    for quiet in (
        Named(preset="smollm2-demo", data=["faq.csv"]),
        Named(preset="smollm2-demo", student="shrink:9"),
        Named(preset="smollm2-demo", student="student", overrides=["student.shrink_to_layers=null"]),
    ):
        assert load_settings(quiet).student.shrink_to_layers != 22 or quiet.student is None
        assert said not in capsys.readouterr().err


def test_names_change_a_preset(pair: Path):
    config = load_settings(Named(preset="smollm2-demo", data=["faq.csv"], method="gkd"))
    preset = load_run_config("smollm2-demo")
    assert (config.data.train, config.method, config.train) == ("faq.csv", "gkd", preset.train)
    two = load_settings(Named(preset="smollm2-demo", data=["a.jsonl", "b.jsonl"]))
    assert two.data.train == ["a.jsonl", "b.jsonl"]


def test_the_precision_of_a_teacher_that_worked_earlier_is_the_one_it_had(pair: Path):
    """Without it in memory everything fits, so that the run would be planned, and named, with another teacher."""
    said = named(method="kd", **{"teacher.responses": "store"})
    assert choose(said, vram="80GiB").config.teacher.precision == "bf16"
    (pair / "store").mkdir()
    (pair / "store" / "store.json").write_text(json.dumps({"precision": "nf4", "complete": True}))
    chosen = choose(said, vram="80GiB")
    assert chosen.config.teacher.precision == "nf4" and "the teacher of store worked so" in chosen.render("distill")


def test_a_run_is_called_after_its_preset_or_file():
    names = [Named(preset="../my.yaml"), Named(preset="/x/my.yml"), Named(config=Path("a/my.yaml"))]
    assert [named.label for named in names] == ["my"] * 3
    assert Named(preset="qwen2.5-7b-to-1.5b").label == "qwen2.5-7b-to-1.5b" and Named().label == "run"


def test_sft_needs_one_model(pair: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["sft", "--student", "student", "--data", "faq.csv", "--dry-run", "--vram", "24GiB"]) == 0
    assert "qswitch sft --model student" in capsys.readouterr().err


def fine_tuned_teacher(vram: str, *overrides: str, **options: str) -> RunConfig:
    """What `qswitch sft --model teacher` trains."""
    named = options or {"teacher": "teacher", "student": "student"}
    return load_settings(
        Named(**named, data=["faq.csv"], method=None if options else "sft", overrides=list(overrides)),
        vram=vram, command="sft --model teacher", trains="teacher",
    )  # fmt: skip


@pytest.mark.parametrize(("vram", "precision"), [("12GiB", "nf4"), ("48GiB", "auto")])
def test_a_teacher_that_is_fine_tuned_is_chosen_for_as_what_learns(pair: Path, capsys, vram: str, precision: str):
    config = fine_tuned_teacher(vram)
    said = capsys.readouterr().err
    assert (config.method, config.student.model, config.student.precision) == ("sft", "teacher", precision)
    assert (config.student.lora.r, config.train.learning_rate) == (64, 1e-4) and f"precision={precision}: " in said
    assert run(["sft", "--model", "teacher", *TWO, "--data", "faq.csv", "--vram", vram, "--dry-run"]) == 0
    words = shlex.split(said.rpartition("The same again: ")[2])
    assert words[:4] == ["qswitch", "sft", "--model", "teacher"]
    overrides = [value for name, value in zip(words[4::2], words[5::2], strict=True) if name == "--set"]
    assert fine_tuned_teacher(vram, *overrides) == config


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_its_precision_may_be_called_that_of_the_teacher_or_of_what_learns(pair: Path, capsys, role: str):
    assert fine_tuned_teacher("80GiB", f"{role}.precision=nf4").student.precision == "nf4"
    (pair / "my.yaml").write_text("extends: qwen2.5-7b-to-1.5b\nteacher: {precision: bf16}\n")
    mine = {"config": Path("my.yaml")}
    assert fine_tuned_teacher("80GiB", **mine).student.precision == "bf16"
    changed = fine_tuned_teacher("80GiB", f"{role}.precision=nf4", "student.lora.r=3", **mine).student
    assert (changed.precision, changed.lora.r, changed.model) == ("nf4", 3, "Qwen/Qwen2.5-7B-Instruct")
    for options in ({}, mine):
        with pytest.raises(ConfigError, match="int8 cannot be fine-tuned"):
            fine_tuned_teacher("80GiB", "teacher.precision=int8", **options)


def test_what_the_pairs_student_is_stays_with_the_student(pair: Path):
    """The warm start gives both commands the same options."""
    (pair / "my.yaml").write_text("extends: qwen2.5-7b-to-1.5b\nteacher: {adapter: runs/t}\n")
    options = ["student.shrink_to_layers=16", "student.tokenizer=shared", "student.init_adapter=runs/s"]
    trained = fine_tuned_teacher("80GiB", *options, "student.lora.r=3", config=Path("my.yaml")).student
    assert (trained.model, trained.shrink_to_layers, trained.lora.r) == ("Qwen/Qwen2.5-7B-Instruct", None, 3)
    assert (trained.tokenizer, trained.init_adapter) == ("auto", "runs/t")
    chosen = fine_tuned_teacher("80GiB", *options).student
    assert (chosen.model, chosen.shrink_to_layers, chosen.init_adapter) == ("teacher", None, None)


def test_the_remedy_of_a_plan_for_a_fine_tuned_teacher_is_heard(pair: Path, capsys):
    command = ["sft", "--model", "teacher", *TWO, "--data", "faq.csv", "--vram", "12GiB", "--dry-run"]
    assert run([*command, "--set", "student.precision=bf16"]) == 3
    assert "et student.precision=nf4" in capsys.readouterr().err
    assert run([*command, "--set", "student.precision=nf4"]) == 0


def test_a_missing_student_is_answered_with_those_that_would_do(pair: Path):
    with pytest.raises(ConfigError) as caught:
        choose(by_section({"teacher.model": "Qwen/Qwen2.5-7B-Instruct", "data.train": "faq.csv"}))
    assert "Qwen/Qwen2.5-0.5B-Instruct (preset qwen2.5-7b-to-0.5b)" in str(caught.value)
    assert "--student shrink keeps two thirds of its 28 layers" in str(caught.value)
    model(pair / "unknown", layers=12, width=1024, vocab=1234)
    with pytest.raises(ConfigError, match=r"Cut one from the teacher: --student shrink keeps two thirds of its 12"):
        choose(by_section({"teacher.model": "unknown", "data.train": "faq.csv"}))


@pytest.mark.parametrize(
    ("teacher", "offered"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", ["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]),
        ("openlm-research/open_llama_7b_v2", ["openlm-research/open_llama_3b_v2"]),
        ("vicuna", []),
    ],
)
def test_students_with_another_tokenizer_are_not_offered(pair: Path, monkeypatch, teacher: str, offered: list[str]):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model(pair / "vicuna", layers=32, width=4096)  # Llama's family and size of vocabulary
    with pytest.raises(ConfigError) as caught:
        choose(by_section({"teacher.model": teacher, "data.train": "faq.csv"}))
    assert re.findall(r"(\S+) \(preset", str(caught.value)) == offered


def test_a_student_is_offered_once_by_the_preset_that_is_nearest(pair: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as caught:
        choose(by_section({"teacher.model": "meta-llama/Llama-3.2-3B-Instruct", "data.train": "faq.csv"}))
    offered = re.findall(r"(\S+) \(preset", str(caught.value))
    assert len(offered) == len(set(offered)) and "Llama-3.2-1B-Instruct (preset llama3.2-3b-to-1b)" in str(caught.value)


THINKS = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def thinking_choices(**changes: object) -> list:
    return [c.value for c in choose(named(**changes), vram="24GiB").choices if "enable_thinking" in c.setting]


def test_models_that_may_think_are_told_not_to_unless_somebody_says_so(pair: Path):
    kwargs = "data.template_kwargs"
    assert thinking_choices() == []
    (pair / "teacher" / "tokenizer_config.json").write_text(json.dumps({"chat_template": THINKS}))
    chosen = choose(named(), vram="24GiB")
    assert thinking_choices() == [False] and chosen.config.data.template_kwargs == {"enable_thinking": False}
    printed = chosen.render("distill")
    assert f"--set {kwargs}.enable_thinking=true --set rollout.max_new_tokens=2048 distils" in printed
    again = shlex.split(printed.rpartition("The same again: ")[2])
    assert f"{kwargs}.enable_thinking=false" in again
    (pair / "teacher" / "chat_template.jinja").write_text("{{ messages }}")  # which transformers reads first
    assert thinking_choices() == []
    (pair / "teacher" / "chat_template.jinja").write_text(THINKS)
    assert thinking_choices(**{f"{kwargs}.enable_thinking": True}) == []
    other = choose(named(**{kwargs: {"polite": True}}), vram="24GiB").config
    assert other.data.template_kwargs == {"polite": True, "enable_thinking": False}
    assert thinking_choices(**{"data.template": "plain"}) == []


def test_answers_that_show_their_thinking_are_learnt_with_it(pair: Path):
    (pair / "teacher" / "chat_template.jinja").write_text(THINKS)
    line = json.dumps({"prompt": "why?", "response": "<think>It may be so.</think>So it is."})
    (pair / "thoughts.jsonl").write_text(f"{line}\n" * 40)
    assert thinking_choices(**{"data.train": "thoughts.jsonl", "method": "sft"}) == []
    assert thinking_choices(**{"data.train": "thoughts.jsonl"}) == [False], "switch reads no answers"


def test_a_model_of_a_preset_thinks_as_the_preset_has_it(pair: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    student = {"student.model": "Qwen/Qwen3-0.6B"}
    assert thinking_choices(**{"teacher.model": "Qwen/Qwen3-8B", **student}) == [False]
    assert thinking_choices(**{"teacher.model": "Qwen/Qwen3-4B-Instruct-2507", **student}) == []


def test_the_template_is_asked_of_the_hub_where_it_is_not_here(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []

    def answer(reference: str, revision: str | None, name: str) -> bytes:
        asked.append((reference, revision, name))
        if name == "chat_template.jinja":
            raise OSError("404")
        return json.dumps({"chat_template": [{"name": "default", "template": THINKS}]}).encode()

    monkeypatch.setattr(model_files, "_ask_hub", answer)
    assert chat_template(TeacherSection(model="some/thinker", revision="v2")) == THINKS
    assert asked == [("some/thinker", "v2", name) for name in ("chat_template.jinja", "tokenizer_config.json")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert chat_template(TeacherSection(model="some/thinker")) is None


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


TWO = ["--teacher", "teacher", "--student", "student"]


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
    (["--teacher", "teacher", "--student", "student", "--data", "faq.csv", "--method", "gdk"], "Did you mean gkd?"),
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

"""Before any weight is loaded: every reason against a run, in one list."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qswitch import preflight
from qswitch.config import RunConfig
from qswitch.data.first_look import counted_prompts, first_look
from qswitch.layers import build_config
from qswitch.preflight import PreflightError, check_settings, prepare, settings_problems
from tests.tiny import CHARACTERS, save_tiny_pair, tiny_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_tiny_pair(folder)
    lines = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def no_weights(monkeypatch) -> None:
    """Nothing here may load any."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.fixture
def copy(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair, tmp_path / "copy"))


def settings(folder: Path, **changes) -> RunConfig:
    values: dict = {
        "teacher": {"model": str(folder / "teacher"), "precision": "fp32"},
        "student": {"model": str(folder / "student"), "precision": "fp32"},
        "data": {"train": str(folder / "data.jsonl"), "num_validation": 2},
        "rollout": {"max_new_tokens": 16},
        "train": {"device": "cpu", "compute_dtype": "fp32"},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return build_config(values)


def problems(action, *arguments) -> list[str]:
    with pytest.raises(PreflightError) as caught:
        action(*arguments)
    return caught.value.problems


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def test_a_sound_configuration_passes_without_any_weights(pair, tmp_path):
    config = settings(pair)
    assert settings_problems(config, tmp_path / "run") == []
    found = prepare(config)
    assert found.prompts.report.records == 10 and len(found.prompts.held_out) == 2
    assert not (tmp_path / "run").exists()


def test_all_reasons_come_in_one_list(pair):
    config = settings(
        pair, data__train="nowhere.jsonl", data__template="nowhere.jinja", rollout__max_new_tokens=600,
        student__init_adapter="nowhere",
    )  # fmt: skip
    found = problems(check_settings, config)
    for setting in ("data.train", "data.template", "teacher.model", "student.model", "student.init_adapter"):
        assert sum(setting in problem for problem in found) == 1, setting
    assert len(found) == 5


def test_prompt_and_response_longer_than_the_context(pair):
    found = problems(check_settings, settings(pair, data__max_prompt_tokens=500))
    assert [p.partition(" ")[0] for p in found] == ["teacher.model", "student.model"]
    assert all("a context of 512 tokens" in p and "make 516" in p for p in found)


def test_a_disk_too_small_for_the_checkpoints(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(0, 0, 1000))
    (found,) = settings_problems(settings(pair), tmp_path / "deep" / "run")
    assert "0.0 GiB free" in found and "train.save_total_limit" in found
    assert not (tmp_path / "deep").exists()


def test_quantisation_that_is_not_there(pair, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    (found,) = problems(check_settings, settings(pair, teacher__precision="nf4"))
    assert "teacher.precision=nf4 needs bitsandbytes" in found and "pip install" in found


def test_widths_that_nf4_cannot_block_on_a_cpu(copy):
    edit(copy / "teacher" / "config.json", hidden_size=60, intermediate_size=100)
    (found,) = problems(check_settings, settings(copy, teacher__precision="nf4"))
    assert "no multiple of 64 (60, 100)" in found


def test_a_plan_for_another_machine_says_nothing_of_this_one(pair, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    config = settings(pair, teacher__precision="nf4", train__device="auto", train__optimizer="paged_adamw_8bit")
    assert len(problems(check_settings, config)) == 2
    check_settings(config, elsewhere=True)


def test_a_tracker_that_is_not_installed(pair, monkeypatch):
    real = preflight.importlib.util.find_spec
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda n: None if n == "wandb" else real(n))
    (found,) = problems(check_settings, settings(pair, train__report_to=["wandb"]))
    assert "pip install wandb" in found


# ------------------------------------------------------------------------------------- again, with tokenizer and data


def test_models_and_data_that_are_not_there_are_listed_together(pair, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{nonsense\n")
    config = settings(pair, teacher__model="no folder", student__model=str(tmp_path), data__train=str(bad))
    found = problems(prepare, config)
    assert len(found) == 3
    assert "teacher.model" in found[0] and "student.model" in found[1] and "bad.jsonl line 1" in found[2]


def test_settings_models_and_every_data_file_are_listed_together(pair, tmp_path):
    """Whatever stage finds a problem, the others still have their say."""
    bad = [tmp_path / f"bad{i}.jsonl" for i in range(2)]
    for i, path in enumerate(bad):
        path.write_text('{"prompt": "fine"}\n' * i + "{nonsense\n")
    (tmp_path / "file").write_text("")
    config = settings(
        pair, student__model="no folder", data__train=[str(p) for p in bad], data__template="nowhere.jinja",
        data__validation=str(bad[0]),
    )  # fmt: skip
    known = settings_problems(config, tmp_path / "file" / "run")
    found = problems(prepare, config, None, known)
    for text in (
        "student.model", "data.template=nowhere.jinja", "--output-dir", "bad0.jsonl line 1", "bad1.jsonl line 2",
    ):  # fmt: skip
        assert any(text in problem for problem in found), text
    assert len(found) == 6  # the file that is named twice has two


def test_other_vocabularies_and_bad_data_are_listed_together(copy, tmp_path):
    tiny_tokenizer(CHARACTERS[::-1]).save_pretrained(copy / "student")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n' * 150 + "{nonsense\n")
    found = problems(prepare, settings(copy, data__train=str(bad)))
    assert len(found) == 2
    assert "different vocabularies" in found[0] and "bad.jsonl line 151" in found[1]


def test_of_two_bad_files_both_are_named(pair, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        path.write_text("[1]\n")
    found = problems(prepare, settings(pair, data__train=[str(f) for f in files]))
    assert ["a.jsonl line 1" in found[0], "b.jsonl line 1" in found[1]] == [True, True] and len(found) == 2


def test_records_beyond_the_limit_are_not_read(copy, tmp_path):
    good = (copy / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "d.jsonl").write_text("".join(good) + "{nonsense\n")
    config = settings(copy, data__train=str(tmp_path / "d.jsonl"), data__limit=len(good), student__model="no folder")
    (found,) = problems(prepare, config)
    assert "student.model" in found


def test_a_gated_preset_without_a_token_names_its_twin(pair, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    about = {"name": "p", "gated": True, "twin": "p-open"}
    (found,) = problems(prepare, settings(pair, teacher__model="no folder", about=about))
    assert "no token for the hub here; the preset p-open needs none" in found
    (tmp_path / "token").write_text("hf_of_a_login")  # as `hf auth login` leaves it
    (found,) = problems(prepare, settings(pair, teacher__model="no folder", about=about))
    assert "token" not in found


def test_code_of_its_own_without_permission(copy):
    (copy / "teacher" / "configuration_own.py").write_text("raise AssertionError('code ran')")
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "configuration_own.Model"}
    edit(copy / "teacher" / "config.json", auto_map=auto, model_type="own")
    config = settings(copy)
    (found,) = problems(prepare, config)
    assert "teacher.model" in found and "trust_remote_code" in found


def test_end_tokens_that_share_nothing(copy):
    """The tokenizer is one, but the generation configs end at different tokens, and the tokenizer names none."""
    student = tiny_tokenizer()
    student.eos_token = "<s>"
    student.save_pretrained(copy / "student")
    for name in ("teacher", "student"):
        (copy / name / "generation_config.json").unlink(missing_ok=True)
    (found,) = problems(prepare, settings(copy))
    assert "ends a response with </s>" in found and "the student with <s>" in found
    assert prepare(settings(copy, data__allow_eos_mismatch=True)).pair.eos_ids == (1, 2)


def test_a_template_whose_special_text_is_split_differently(copy, monkeypatch):
    teacher = tiny_tokenizer(chat_template="<tag>{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}")
    teacher.save_pretrained(copy / "teacher")
    from qswitch.models import pair as pair_module

    class Splitting:
        """A tokenizer that knows the tag as one token, where the other spells it out."""

        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, text, **options):
            return self.inner(text.replace("<tag>", "?"), **options)

    monkeypatch.setattr(pair_module, "check_tokenizers", lambda *_a, teacher_rows, **_k: teacher_rows)
    original = pair_module.load_tokenizer
    monkeypatch.setattr(
        pair_module, "load_tokenizer",
        lambda section: Splitting(original(section)) if "student" in section.model else original(section),
    )  # fmt: skip
    (found,) = problems(prepare, settings(copy))
    assert "data.template=teacher: from token 0" in found


def test_prompts_alone_with_a_method_that_needs_responses(copy):
    (copy / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(10)))
    (found,) = problems(prepare, settings(copy, method="kd"))
    assert "method=kd" in found and "10 of 10 records have none" in found
    (before,) = problems(check_settings, settings(copy, method="kd"))  # before tokenizers are read
    assert "method=kd" in before and "data.jsonl line 1 has none" in before and "such as switch" in before
    gone = settings(copy, method="kd", student__model=str(copy / "gone"))
    assert problems(prepare, gone, [before]).count(before) == 1, "said before and found again"
    (before,) = problems(check_settings, settings(copy, method="gkd"))
    assert "set data.ground_truth_mix=0" in before
    assert prepare(settings(copy)).prompts.report.without_response == 10


def test_a_record_that_is_left_out_for_its_length_needs_no_response(copy):
    lines = [{"prompt": "say it " * 100}, *({"prompt": f"say {i}", "response": f"it is {i}"} for i in range(10))]
    (copy / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    short = settings(copy, method="kd", data__max_prompt_tokens=64)
    check_settings(short)
    assert prepare(short).prompts.report.too_long == 1


def test_prompts_that_are_counted_before_a_tokenizer_is_there_are_those_that_train(copy):
    sets = [str(copy / "data.jsonl"), str(copy / "more.jsonl")]
    more = [json.dumps({"prompt": f"more of {i}"}) for i in range(30)]
    (copy / "more.jsonl").write_text("\n".join(more) + "\n")
    weighted = {"data__train": sets, "data__weights": [3, 1], "data__num_validation": 16}
    for given in ({}, {"data__limit": 7}, {"data__num_validation": 1}, weighted):
        config = settings(copy, **given)
        assert counted_prompts(first_look(config)) == prepare(config).prompts.report.training_prompts


THINKS = "{{ messages[0]['content'] }}{% if enable_thinking is defined and not enable_thinking %} {% endif %}"


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        ({}, True),
        ({"data__template_kwargs": {"enable_thinking": True}}, False),
        ({"data__template_kwargs": {"enable_thinking": False}}, False),
        ({"method": "sft"}, False),
    ],
)
def test_models_that_may_think_until_the_limit_are_said(copy, caplog, changes, is_said):
    (copy / "think.jinja").write_text(THINKS)
    prepare(settings(copy, data__template=str(copy / "think.jinja"), **changes))
    found = [r.getMessage() for r in caplog.records if "think before they answer" in r.getMessage()]
    assert len(found) == is_said
    assert not found or "data.template_kwargs.enable_thinking=false" in found[0]


def test_a_prompt_to_which_a_template_was_applied_already_is_said(copy, caplog):
    tokenizer = AutoTokenizer.from_pretrained(copy / "teacher")
    marker = max(tokenizer.all_special_tokens, key=len)
    plain = settings(copy)
    prepare(plain)
    assert not any("chat template around it" in r.getMessage() for r in caplog.records)
    lines = [{"text": f"{marker}say {i}"} for i in range(10)]
    (copy / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(plain)
    (said,) = [r.getMessage() for r in caplog.records if "chat template around it" in r.getMessage()]
    assert "data.jsonl line 1" in said and marker in said and "data.template=plain" in said


def test_a_gpu_that_is_not_there(pair, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = problems(prepare, settings(pair, train__device="cuda"))
    assert len(found) == 1 and "torch" in found[0] and "train.device=cpu" in found[0]


def test_other_characters_are_a_vocabulary_of_their_own(copy):
    tiny_tokenizer(CHARACTERS[::-1]).save_pretrained(copy / "student")
    (found,) = problems(prepare, settings(copy))
    assert "different vocabularies" in found


def test_a_model_whose_parts_are_not_all_there(copy):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (copy / "teacher" / "model.safetensors").rename(copy / "teacher" / "model-1.safetensors")
    (copy / "teacher" / "model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = problems(prepare, settings(copy))
    assert "1 of 2 weight files are missing, for example model-2.safetensors" in found


def test_a_misspelt_target_among_right_ones(pair):
    lora = {"target_modules": ["q_proj", "vproj", "lm_head"]}
    (found,) = problems(check_settings, settings(pair, student__lora=lora))
    assert "names vproj" in found and "v_proj" in found


def test_a_corpus_is_read_and_measured(pair, tmp_path):
    (tmp_path / "c.txt").write_text("the quick brown fox " * 20)
    config = settings(pair, data__lm_corpus=str(tmp_path / "c.txt"), loss__lm_passage_tokens=64)
    assert prepare(config).corpus.numel() == 401
    (found,) = problems(prepare, settings(pair, data__lm_corpus=str(tmp_path / "c.txt"), loss__lm_passage_tokens=500))
    assert "401 tokens, less than one passage" in found

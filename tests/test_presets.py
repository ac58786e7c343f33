"""Presets: each shipped file is valid, twins agree, and `extends` merges key by key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qswitch.cli import run
from qswitch.errors import ConfigError
from qswitch.layers import build_config
from qswitch.preset_index import render_index
from qswitch.preset_info import describe, plan_presets, render_page
from qswitch.presets import load_preset, load_run_config, preset_names
from qswitch.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]
GATED = [name for name in preset_names() if load_run_config(name).about.gated]
OPEN_TWINS = {load_run_config(name).about.twin: name for name in GATED}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", preset_names())
def test_a_shipped_preset_is_valid_and_describes_itself(name: str):
    config = load_run_config(name)
    assert config.about.name == name
    assert config.about.description.endswith(".")
    assert config.teacher.shape and config.student.shape, "a preset can be planned before any download"
    for used in (config.teacher.model, config.student.model, config.data.train, config.data.lm_corpus):
        references = [used] if isinstance(used, str) else used or []
        assert not references or any(name in config.about.licences for name in references), f"no licence for {used}"


@pytest.mark.parametrize("name", preset_names())
def test_a_shape_block_cites_its_source(name: str):
    config = load_run_config(name)
    for section in (config.teacher, config.student):
        references = [section.model] if isinstance(section.model, str) else section.model
        # A copy that is not gated has the shape of its original, which the gated preset cites.
        originals = [] if name not in OPEN_TWINS else [load_run_config(OPEN_TWINS[name])]
        sources = config.about.shape_sources | {k: v for c in originals for k, v in c.about.shape_sources.items()}
        assert sources and all(source.startswith("https://") for source in sources.values())
        assert originals or any(reference in sources for reference in references)


@pytest.mark.parametrize("name", preset_names())
def test_teacher_and_student_are_of_one_family_and_differ_in_padding_at_most(name: str):
    config = load_run_config(name)
    teacher, student = config.teacher.shape, config.student.shape
    assert teacher["model_type"] == student["model_type"]
    assert abs(teacher["vocab_size"] - student["vocab_size"]) < 256


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_fits_its_card_and_dry_runs(name: str, capsys: pytest.CaptureFixture[str]):
    info = describe(name)
    assert info.fits
    card = [] if info.vram is None else ["--vram", info.vram]
    assert run(["distill", "--preset", name, "--dry-run", *card]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Fits: ") and ("/proc/meminfo" if card == [] else f"(--vram {info.vram})") in printed


@pytest.mark.parametrize("gated", GATED)
def test_a_gated_preset_has_a_twin_that_differs_in_the_models_alone(gated: str):
    one, other = load_run_config(gated), load_run_config(load_run_config(gated).about.twin)
    assert one.about.gated and not other.about.gated and other.about.twin is None
    values, twin = one.model_dump(exclude={"about"}), other.model_dump(exclude={"about"})
    for role in ("teacher", "student"):
        values[role].pop("model"), twin[role].pop("model")
    assert values == twin


def test_the_paper_s_pairs_have_the_paper_s_settings():
    # Koo et al. 2025: lambda 0.1, tau_0 1, half of the batches ground truth, reverse skew KL (0.1) over all tokens.
    papers = [load_run_config(name) for name in preset_names() if load_run_config(name).about.paper]
    assert len(papers) == 7
    for config in papers:
        rollout, loss, train = config.rollout, config.loss, config.train
        assert (rollout.policy, rollout.schedule, rollout.tau_0, rollout.decay_rate) == (
            "switch",
            "exponential",
            1,
            0.1,
        )
        assert (loss.divergence, loss.alpha, loss.scope) == ("skew_reverse_kl", 0.1, "all")
        assert config.data.ground_truth_mix == 0.5 and config.data.template == "alpaca"
        assert config.data.lm_corpus == "Skylion007/openwebtext"
        assert (loss.lm_coefficient, loss.lm_passage_tokens) == (1, 512)
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps in (8, 16)
        below_1b = "3b" not in config.about.name.split("-to-")[1]
        grid = (5e-4, 1e-4, 5e-5) if below_1b else (5e-5, 1e-5, 5e-6)
        assert train.learning_rate in grid
        epochs = train.max_steps * 8 / 11_435
        assert epochs == pytest.approx(20 if below_1b else 10, rel=1e-3)
        assert (train.lr_scheduler_type, train.warmup_steps, train.weight_decay, train.max_grad_norm) == (
            "cosine",
            0,
            0.01,
            1,
        )


def test_the_page_of_the_presets_is_current():
    page = ROOT / "presets" / "README.md"
    assert page.read_text(encoding="utf-8") == render_page(), "run `make presets` and commit presets/README.md"


def test_the_index_of_the_presets_is_current():
    index = (ROOT / "presets" / "index.json").read_text(encoding="utf-8")
    assert index == render_index(plan_presets()), "run `make presets` and commit presets/index.json"


def test_the_list_names_card_peak_and_access(capsys: pytest.CaptureFixture[str]):
    assert run(["presets", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "12GiB" in lines["llama-7b-to-1b"] and "Without one: llama-7b-to-1b-open" in lines["llama-7b-to-1b"]
    assert "CPU" in lines["smollm2-demo"]


def test_show_says_what_a_preset_is_for_and_stays_yaml(capsys: pytest.CaptureFixture[str]):
    assert run(["presets", "show", "llama-7b-to-1b"]) == 0
    printed = capsys.readouterr().out
    head = [line for line in printed.splitlines() if line.startswith("#")]
    assert any("needs HF_TOKEN; without one: llama-7b-to-1b-open" in line for line in head)
    assert "# run: qswitch distill --preset llama-7b-to-1b" in head
    assert any("planned peak" in line for line in head)
    assert build_config(yaml.safe_load(printed)) == load_run_config("llama-7b-to-1b")


def test_every_file_of_the_folder_is_listed():
    assert preset_names() == sorted(p.stem for p in (ROOT / "presets").glob("*.yaml"))


def test_the_extending_file_wins_key_by_key(tmp_path: Path):
    path = write(tmp_path, "mine.yaml", "extends: smollm2-demo\ntrain: {max_steps: 7}\n")
    mine, base = load_run_config(path), load_run_config("smollm2-demo")
    assert mine.train.max_steps == 7
    assert mine.train.learning_rate == base.train.learning_rate
    assert mine.teacher == base.teacher


def test_null_takes_the_extended_value_away(tmp_path: Path):
    path = write(tmp_path, "mine.yaml", "extends: llama-7b-to-1b\nabout: {twin: null}\nstudent: {lora: null}\n")
    values = load_preset(path)
    assert "twin" not in values["about"]
    assert "lora" not in values["student"]


def test_a_file_may_extend_a_file_beside_it(tmp_path: Path):
    write(tmp_path, "base.yaml", "extends: smollm2-demo\nseed: 1\n")
    path = write(tmp_path, "mine.yaml", "extends: base.yaml\n")
    assert load_run_config(path).seed == 1


def test_a_circle_is_refused(tmp_path: Path):
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: b\.yaml -> a\.yaml -> b\.yaml"):
        load_preset(path)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean smollm2-demo\?.*qswitch presets list"):
        load_preset("smolm2-demo")


@pytest.mark.parametrize("name", ["../presets/smollm2-demo", "", "."])
def test_a_preset_is_a_name_not_a_path(name: str):
    with pytest.raises(ConfigError, match="There is no preset"):
        load_preset(name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1\nb: 2\n", r"line \d+: not valid YAML"),
        (b"- a\n- b\n", "found list"),
        (b"", "found NoneType"),
        (b"a: \xff\n", "not UTF-8"),
    ],
)
def test_an_unreadable_file_says_why(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_yaml(path)


def test_a_missing_file_or_a_folder_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_run_config(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        load_run_config(tmp_path / "folder.yaml")


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_another_model_does_not_keep_the_shape_of_the_presets(role, tmp_path):
    preset = load_run_config("llama-7b-to-1b")
    assert getattr(preset, role).shape is not None
    other = load_run_config("llama-7b-to-1b", [f"{role}.model=org/other"])
    assert getattr(other, role).shape is None
    described = load_run_config("llama-7b-to-1b", [f"{role}.model=org/other", f"{role}.shape={{model_type: llama}}"])
    assert getattr(described, role).shape == {"model_type": "llama"}
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: llama-7b-to-1b\n{role}: {{model: org/other}}\n")
    extended = load_run_config(str(mine))
    assert getattr(extended, role).shape is None
    untouched = "student" if role == "teacher" else "teacher"
    assert getattr(extended, untouched).shape == getattr(preset, untouched).shape


def test_full_training_leaves_the_inherited_adapter_settings_behind(tmp_path):
    config = load_run_config("llama-7b-to-1b", ["student.adapter=none", "student.precision=bf16"])
    assert config.student.adapter == "none" and "lora" not in config.student.model_fields_set
    own = tmp_path / "own.yaml"
    own.write_text("extends: llama-7b-to-1b\nstudent: {adapter: none, precision: bf16}\n", encoding="utf-8")
    assert load_run_config(own).student == config.student
    # What is said beside it is no inheritance.
    with pytest.raises(ConfigError, match=r"student\.lora has no effect with student\.adapter=none"):
        load_run_config("llama-7b-to-1b", ["student.adapter=none", "student.lora.r=8", "student.precision=bf16"])

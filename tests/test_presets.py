"""Presets: each shipped file is valid, twins agree, and `extends` merges key by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qswitch.errors import ConfigError
from qswitch.presets import list_presets, load_preset, load_run_config, preset_names
from qswitch.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[1]


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
    for model in (config.teacher.model, config.student.model):
        references = [model] if isinstance(model, str) else model
        assert any(reference in config.about.licences for reference in references), f"no licence for {model}"


@pytest.mark.parametrize("info", [i for i in list_presets() if i.gated], ids=lambda i: i.name)
def test_a_gated_preset_has_a_twin_that_differs_in_the_models_alone(info):
    twin = load_run_config(info.twin)
    gated = load_run_config(info.name)
    assert not twin.about.gated
    assert twin.model_dump(exclude={"about", "teacher"}) == gated.model_dump(exclude={"about", "teacher"})
    assert twin.teacher.shape == gated.teacher.shape


def test_every_file_of_the_folder_is_listed():
    assert preset_names() == sorted(p.stem for p in (ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize(
    ("shape", "parameters_millions"),
    # Counts published on the models' pages.
    [("llama-7b-to-1b.teacher", 6738.4), ("llama-7b-to-1b.student", 1100.0), ("smollm2-demo.teacher", 134.5)],
)
def test_a_shape_has_the_published_number_of_parameters(shape: str, parameters_millions: float):
    preset, role = shape.split(".")
    s = load_preset(preset)[role]["shape"]
    width, head = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    attention = 2 * width * width + 2 * width * head * s["num_key_value_heads"]
    layer = attention + 3 * width * s["intermediate_size"] + 2 * width
    tables = s["vocab_size"] * width * (1 if s["tie_word_embeddings"] else 2)
    total = s["num_hidden_layers"] * layer + tables + width
    assert total / 1e6 == pytest.approx(parameters_millions, rel=1e-3)


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

"""What `qswitch eval` is asked about: runs and their parts, adapters, merged folders, models with other templates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AddedToken

import qswitch.evaluate.evaluate as evaluate_module
import qswitch.evaluate.write as write_module
from qswitch.cli import run
from qswitch.data.records import Record
from qswitch.data.template import PromptEncoder
from qswitch.data.turns import Message
from qswitch.errors import RunDirError
from qswitch.evaluate.command import run_eval
from qswitch.evaluate.marks import TrainedWeights
from qswitch.evaluate.subjects import find_subject
from qswitch.export.merge import merge_run
from qswitch.manifest import write_manifest
from qswitch.models.references import ResolvedModel
from tests.evaluate.runs import make_run, write_test_set
from tests.evaluate.test_evaluate import made, request
from tests.tiny import tiny_tokenizer

__all__ = ["made"]


def test_an_adapter_a_merged_folder_and_a_plain_model_are_read(made, tmp_path):
    run_path, _ = made
    merge_run(run_path, tmp_path / "merged", dtype="fp32")
    models = [str(run_path), f"merged={tmp_path / 'merged'}", f"adapter={run_path / 'adapter'}"]
    results, _ = run_eval(
        request(made, tmp_path / "out", models=models, protocol="greedy", seeds=None, precision="fp32", device="cpu"),
        say=lambda _: None,
    )
    for name in ("merged", "adapter"):
        difference = results["sets"]["questions"]["differences"][name]
        assert abs(difference["kl_nats"]["all"]["mean"]) < 1e-5
        assert difference["rouge_l"]["all"]["mean"] == pytest.approx(0.0)


def test_models_of_one_family_answer_the_same_text_and_others_have_their_own_template(made, tmp_path):
    from transformers import AutoTokenizer

    run_path, _ = made
    merge_run(run_path, tmp_path / "merged", dtype="fp32")
    for name in ("merged", "other"):
        if name == "other":
            import shutil

            shutil.copytree(tmp_path / "merged", tmp_path / "other")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.chat_template = "{{ messages[-1]['content'] }} of its own"
        if name == "other":
            tokenizer.add_tokens(["elsewhere"])
        tokenizer.save_pretrained(tmp_path / name)
    models = [str(run_path), str(tmp_path / "merged"), str(tmp_path / "other")]
    asked: dict[str, list[list[int]]] = {}
    real = write_module.rollout
    with pytest.MonkeyPatch.context() as patch:

        def remember(requests, *, student, **options):
            asked.setdefault(len(asked), []).extend(r.prompt_ids for r in requests)
            return real(requests, student=student, **options)

        patch.setattr(write_module, "rollout", remember)
        run_eval(
            request(made, tmp_path / "out", models=models, protocol="greedy", seeds=None, precision="fp32",
                    device="cpu", no_teacher=True, batch_size=16),
            say=lambda _: None,
        )  # fmt: skip
    first, same, other = asked.values()
    assert sorted(first) == sorted(same) and sorted(first) != sorted(other)


def test_a_template_whose_tokens_have_other_names_is_not_put_on_another_model():
    """One vocabulary by its ids: a template without those names is shared, one with them would be read as letters."""
    named, reserved = (("<|user|>", "<|end_turn|>"), ("<unused0>", "<unused1>"))

    def subject(names: tuple[str, str], template: str):
        def tokenizer(_: str):
            loaded = tiny_tokenizer(chat_template=template)
            loaded.add_tokens([AddedToken(n, special=True, normalized=False) for n in names], special_tokens=True)
            return loaded

        return SimpleNamespace(tokenizer=tokenizer, template_kwargs=lambda _: {})

    record = Record(0, (Message("user", "hi"),), None, "here")
    test_set = SimpleNamespace(records=[SimpleNamespace(record=record)])

    def asked(first_template: str) -> tuple[list[int], list[int], Any]:
        first = subject(named, first_template)
        second = subject(reserved, "<unused0>{{ messages[-1]['content'] }}<unused1>")
        prompts = {0: PromptEncoder(first.tokenizer("student"), "student").encode(record)}
        settings, encoded = SimpleNamespace(subjects=[first, second]), SimpleNamespace(prompts=prompts)
        found = evaluate_module._own_prompts(settings, second, test_set, encoded, "student")  # type: ignore[arg-type]
        return prompts[0].prompt_ids, found[0].prompt_ids, second.tokenizer("student")

    first, second, _ = asked("{{ messages[-1]['content'] }}:")
    assert first == second
    first, second, tokenizer = asked("<|end_turn|>{{ messages[-1]['content'] }}<|user|>")
    assert tokenizer.convert_ids_to_tokens(second) == ["<unused0>", "h", "i", "<unused1>"]


def test_a_student_on_the_hub_has_a_mark_of_its_own(tmp_path, monkeypatch):
    import yaml

    import qswitch.evaluate.subjects as subjects

    folder = make_run(tmp_path)
    values = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
    marks = []
    for student in ("maker/small", "maker/smaller"):
        values["student"]["model"], values["teacher"]["model"] = student, "maker/large"
        (folder.path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        monkeypatch.setattr(
            subjects, "resolve_reference", lambda name, revision=None: ResolvedModel(name, revision, name)
        )
        marks += [find_subject(f"{folder.path}:{part}").fingerprint for part in ("base", "teacher")]
    assert marks[0] != marks[1] and marks[0] != marks[2] and marks[1] == marks[3]


def test_a_run_whose_base_was_replaced_is_asked_again(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_run(tmp_path)
    before = find_subject(str(folder.path)).fingerprint
    weights = Path(folder.config.student.model) / "model.safetensors"
    content = load_file(weights)
    save_file(content, weights, metadata={"format": "pt"})
    assert find_subject(str(folder.path)).fingerprint == before, "the same content, written anew"
    save_file({k: v + 1 for k, v in content.items()}, weights, metadata={"format": "pt"})
    assert find_subject(str(folder.path)).fingerprint != before


def test_a_named_model_may_lie_in_the_home_folder_or_have_an_equals_sign_in_its_path(made, tmp_path, monkeypatch):
    run_path, _ = made
    monkeypatch.setenv("HOME", str(run_path.parent))
    assert find_subject(f"mine=~/{run_path.name}").name == "mine"
    assert find_subject(f"mine=~/{run_path.name}:base").part == "base"
    odd = tmp_path / "r=16"
    odd.symlink_to(run_path)
    monkeypatch.chdir(tmp_path)
    assert find_subject("r=16").run_dir is not None and find_subject("r=16:teacher").part == "teacher"
    results, _ = run_eval(request((Path("r=16"), made[1]), tmp_path / "out", limit=1, seeds="10"), say=lambda _: None)
    assert results["teacher"]


def test_the_result_says_which_weights_of_a_run_were_measured(tmp_path):
    run_dir = make_run(tmp_path)
    here = (run_dir.path, write_test_set(tmp_path / "questions.jsonl"))
    early = run_dir.checkpoints_path / "step-000300" / "adapter"
    early.parent.mkdir(parents=True)
    run_dir.adapter_path.rename(early)
    write_manifest(early.parent)
    wanted = request(here, tmp_path / "out", models=[str(run_dir.path), f"{run_dir.path}:base"], no_teacher=True)
    results, folder = run_eval(replace(wanted, limit=1), say=lambda _: None)
    run, base = results["weights"]["run"], results["weights"]["run-base"]
    assert (run["trained"]["step"], run["trained"]["finished"]) == (300, False) and base["trained"] is None
    assert run["fingerprint"] == (folder / "models/run/weights.txt").read_text("utf-8").strip() != base["fingerprint"]
    assert "run: the weights of step 300; the run had not finished.\n" in (folder / "results.md").read_text("utf-8")
    assert run["trained"]["mark"] == TrainedWeights.present(run_dir).mark

    # The run goes on and replaces the checkpoint before its weights are read: others would stand under that step.
    found = find_subject(str(run_dir.path))
    early.parent.rename(run_dir.checkpoints_path / "step-000301")
    with pytest.raises(RunDirError, match="went on training"):
        found.load()


def test_a_model_of_another_tokenizer_is_refused_before_any_weight_is_read(made, tmp_path, monkeypatch, capsys):
    run_path, data = made
    merge_run(run_path, tmp_path / "other", dtype="fp32")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["elsewhere"])
    tokenizer.save_pretrained(tmp_path / "other")
    monkeypatch.setattr("qswitch.evaluate.subjects.Subject.load", None)
    out = tmp_path / "out"
    assert run(["eval", str(run_path), str(tmp_path / "other"), "--data", str(data), "--output-dir", str(out)]) == 2
    said = capsys.readouterr().err
    assert "The distance of other from the teacher" in said and "'elsewhere'" in said
    assert "Leave other out, or add --no-teacher" in said and "seqkd" not in said
    assert not out.exists()

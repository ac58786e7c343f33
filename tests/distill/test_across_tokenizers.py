"""method=seqkd between models with different tokenizers: the teacher's text, and it alone, reaches the student."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qswitch import run, teach
from qswitch.cli import run as command
from qswitch.config import DataSection
from qswitch.data.files import Row
from qswitch.data.records import record_of_row
from qswitch.data.template import PromptEncoder
from qswitch.distill import session, teacher_text
from qswitch.distill.learner import Learner
from qswitch.distill.trainer import Trainer
from qswitch.errors import ConfigError, DataError, Interrupted, QSwitchError, RunDirError
from qswitch.evaluate.command import EvalRequest, run_eval
from qswitch.evaluate.fidelity import fidelity
from qswitch.export.merge import merge_run
from qswitch.layers import build_config
from qswitch.models import load
from qswitch.models.pair import student_half
from qswitch.plan.scheduler import plan_for
from qswitch.preflight import prepare
from qswitch.rollout.chat import Chat
from qswitch.rollout.generate import generate_from_run
from qswitch.run_dir import RunDir
from tests.tiny import save_tiny

TEXT = [
    "the quick brown fox jumps over the lazy dog and tells everybody about it, again and again",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,:;!?'|<>_-\n",
    "tell me about the weather in the north; tell me about a red house; it is what it is",
]
TEACHER_TEMPLATE = (
    "{% if polite %}please\n{% endif %}"
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
STUDENT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS = {"train.max_steps": 4, "rollout.max_new_tokens": 12}


def bpe(size: int, special: list[str], *, metaspace: bool, **tokens: str) -> PreTrainedTokenizerFast:
    """A small BPE tokenizer, trained here."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<s>", "</s>", "<unk>", *special])
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left", **tokens
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    """teacher, student and data.jsonl. The teacher closes a turn with <|end|>, which only its generation config names;
    the student opens turns with tokens of its own."""
    folder = tmp_path_factory.mktemp("pair")
    own = bpe(150, ["<|turn|>", "<|end|>"], metaspace=False, eos_token="</s>")
    own.chat_template = TEACHER_TEMPLATE
    other = bpe(110, ["<user>", "<assistant>", "<system>"], metaspace=True, eos_token="</s>")
    other.chat_template = STUDENT_TEMPLATE
    save_tiny(folder / "teacher", "qwen2", seed=1, layers=2, vocab_size=len(own), tokenizer=own)
    save_tiny(folder / "student", "llama", seed=2, layers=2, vocab_size=len(other), tokenizer=other)
    generation = folder / "teacher" / "generation_config.json"
    values = json.loads(generation.read_text()) | {"eos_token_id": [2, own.convert_tokens_to_ids("<|end|>")]}
    generation.write_text(json.dumps(values))
    lines = [{"prompt": f"tell me about {'abcdefghij'[i % 10] * (1 + i % 7)}"} for i in range(30)]
    lines[3] = {"messages": [
        {"role": "system", "content": "it is what it is"}, {"role": "user", "content": "tell me"},
        {"role": "assistant", "content": "the house"}, {"role": "user", "content": "again"},
    ]}  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(pair: Path, method: str = "seqkd", **changes: Any) -> Any:
    values = {
        "method": method,
        "teacher.model": str(pair / "teacher"), "teacher.precision": "fp32",
        "student.model": str(pair / "student"), "student.precision": "fp32", "student.lora": {"r": 4, "alpha": 8},
        "data.train": str(pair / "data.jsonl"), "data.num_validation": 4, "data.max_prompt_tokens": 96,
        "rollout.batch_size": 4, "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 3,
        "train.learning_rate": 5e-3, "train.eval_steps": 2, "train.save_steps": 2, "train.device": "cpu",
        "train.compute_dtype": "fp64", **SETTINGS, **changes,
    }  # fmt: skip
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        section, _, key = dotted.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return build_config(nested)


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted((folder / "teacher_text").glob(f"{kind}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(pair: Path, tmp_path_factory: Any) -> tuple[Path, Any, list[Any]]:
    """A greedy run, its summary, and every sequence that was learnt."""
    folder, learnt = tmp_path_factory.mktemp("runs") / "run", []
    original = Learner.learn_step

    def remember(self: Learner, sequences: Any, step: int) -> Any:
        learnt.extend(sequences)
        return original(self, sequences, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "learn_step", remember)
        patch.setattr(teacher_text, "PART_RESPONSES", 5)
        summary = run.distill(settings(pair, **{"rollout.temperature": 0.0}), folder)
    return folder, summary, learnt


def test_the_text_is_what_the_teacher_alone_generates(pair, finished):
    folder, _, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(pair / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(pair / "teacher", dtype=torch.float64)
    written = lines_of(folder, "train")
    assert len(written) == 4 * 6
    ends = set()
    for line in written:
        *prompt, answer = line["messages"]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            found = teacher.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        ended = int(found[-1]) in teacher.generation_config.eos_token_id
        text = tokenizer.decode(found, skip_special_tokens=True)
        assert answer == {"role": "assistant", "content": text}
        assert line["teacher_response"] == ("whole" if ended else "cut")
        ends.add(ended)
    assert ends == {True, False}, "the test has responses of both kinds"


def test_the_student_learns_the_text_in_its_own_tokens_and_nothing_else(pair, finished):
    folder, summary, learnt = finished
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    expected = []
    for line in lines_of(folder, "train"):
        *prompt, answer = line["messages"]
        ids = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id] if line["teacher_response"] == "whole" else []
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        before = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        expected.append((tuple(before), tuple(ids[:12] if len(ids) >= 12 else [*ids, *end])))
    found = [(tuple(s.prompt_ids), tuple(s.response_ids)) for s in learnt]
    assert all(s.loss_steps == list(range(len(s.response_ids))) for s in learnt), "earlier turns are context"
    assert set(found) <= set(expected) and len(found) == 4 * 6
    assert summary.trained_tokens == sum(len(response) for _, response in found)


def test_a_run_says_the_loss_on_the_teachers_text_and_no_kl(pair, finished):
    folder, summary, _ = finished
    assert summary.method == "seqkd" and summary.teacher == str(pair / "teacher")
    assert summary.kl_before_nats is None and summary.own_before is None
    assert summary.response_loss_after_nats < summary.response_loss_before_nats
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    student = AutoModelForCausalLM.from_pretrained(pair / "student", dtype=torch.float64)
    nats = tokens = size = 0.0
    for line in lines_of(folder, "held_out"):
        prompt = tokenizer.apply_chat_template(line["messages"][:-1], add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        text = line["messages"][-1]["content"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = (ids + [2] * (line["teacher_response"] == "whole"))[:12]
        with torch.no_grad():
            log_q = student(torch.tensor([before + ids])).logits[0].log_softmax(-1)
        nats -= sum(log_q[len(before) + i - 1, token].item() for i, token in enumerate(ids))
        tokens += len(ids)
        size += len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    assert summary.response_loss_before_nats == pytest.approx(nats / tokens, abs=1e-9)
    assert (summary.validation_tokens, summary.validation_bytes) == (tokens, size)
    page = (folder / "report.html").read_text(encoding="utf-8")
    bits = summary.response_loss_after_nats * tokens / size / math.log(2)
    assert "through text, since their tokenizers differ" in page and f"{bits:.3f}" in page
    assert "what the teacher wrote" in page
    held_out = json.loads((folder / "held_out.json").read_text())
    assert held_out["reference"] == "teacher" and held_out["answers"][0]["after"] is not None
    assert "distilled from the text of" in (folder / "adapter" / "README.md").read_text()


def test_the_finished_student_answers_and_is_evaluated(pair, finished, tmp_path):
    folder, _, _ = finished
    (answer,) = generate_from_run(folder, ["tell me about b"], max_new_tokens=4, temperature=0.0)
    assert len(answer.tokens) <= 4
    with pytest.raises(ConfigError, match="another tokenizer"):
        generate_from_run(folder, ["tell me"], show_writers=True)
    (tmp_path / "test.jsonl").write_text('{"prompt": "tell me about b", "response": "it is"}\n' * 2)
    said: list[str] = []
    for model in (str(folder), f"{folder}:teacher"):
        request = EvalRequest(models=[model], columns=[], data=[str(tmp_path / "test.jsonl")], max_new_tokens=4,
                              output_dir=tmp_path / f"eval-{len(said)}")  # fmt: skip
        results, _ = run_eval(request, say=said.append)
        (scores,) = results["sets"]["test"]["models"].values()
        assert scores["response_tokens"] > 0
    assert any("distance from it (KL) is left out" in line for line in said)
    with pytest.raises(ConfigError, match="Fidelity compares"):
        fidelity(RunDir.open(folder).config, run_dir=None, work_dir=tmp_path)


def test_in_a_conversation_the_teacher_reads_and_writes_its_own_tokens(pair, finished):
    folder, _, _ = finished
    shown: list[str] = []
    lines = iter(["tell me about aaa", "/teacher", "/quit"])
    Chat(folder, temperature=0.0, say=shown.append, show=lambda generation, _: shown.append(generation.text),
         read=lambda _: next(lines)).converse()  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(pair / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(pair / "teacher", dtype=torch.float64)
    turns = [{"role": "user", "content": "tell me about aaa"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        written = teacher.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected and shown[-2:] == ["[teacher]", expected]


def test_a_stop_while_writing_and_one_while_learning_change_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_text, "PART_RESPONSES", 5)
    whole = run.distill(settings(pair), tmp_path / "whole")
    path, write, parts = tmp_path / "stopped", teacher_text.write_atomically, []

    def stop_after_three(target: Path, text: str) -> None:
        if target.suffix == ".jsonl":
            if len(parts) == 3:
                raise KeyboardInterrupt
            parts.append(target)
        write(target, text)

    monkeypatch.setattr(teacher_text, "write_atomically", stop_after_three)
    with pytest.raises(Interrupted):
        run.distill(settings(pair), path)
    kept = {p: p.stat().st_mtime_ns for p in parts}
    monkeypatch.setattr(teacher_text, "write_atomically", write)
    train_step = Trainer.train_step

    def stop_at_two(self: Trainer) -> Any:
        self.stop_requested = self.step == 1
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", stop_at_two)
    with pytest.raises(Interrupted):
        run.resume(path)
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items()), "what was written is kept"
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(teacher_text, "load_teacher", _refuse)
    resumed = run.resume(path)
    for kind in ("train", "held_out"):
        assert lines_of(path, kind) == lines_of(tmp_path / "whole", kind)
    assert resumed.response_loss_after_nats == whole.response_loss_after_nats
    ours, theirs = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (path, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _refuse(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("weights were loaded")


def test_damaged_text_is_written_again_and_that_of_other_data_refused(pair, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text((pair / "data.jsonl").read_text())
    monkeypatch.setattr(teacher_text, "PART_RESPONSES", 5)
    monkeypatch.setattr(session, "load_student", _stop)
    with pytest.raises(Interrupted):
        run.distill(settings(pair, **{"data.train": str(data)}), tmp_path / "run")
    before = lines_of(tmp_path / "run", "train")
    damaged = tmp_path / "run" / "teacher_text" / "train-000001.jsonl"
    damaged.write_text(damaged.read_text().replace("assistant", "assistand", 1))
    with pytest.raises(Interrupted):
        run.resume(tmp_path / "run")
    assert lines_of(tmp_path / "run", "train") == before
    data.write_text(data.read_text().replace("tell me about", "say something of"))
    with pytest.raises(RunDirError, match="is for another run: it has other data"):
        run.resume(tmp_path / "run")


def _stop(*_args: object, **_kwargs: object) -> None:
    raise KeyboardInterrupt


def test_the_plan_has_the_teacher_alone_then_the_student_alone_and_the_dry_run_agrees(pair):
    config = settings(pair, **{"train.compute_dtype": "fp32"})
    plan, _ = plan_for(config, vram="4GiB")
    rehearsed, *_ = run.rehearse(config, vram="4GiB")
    assert plan.to_dict() == rehearsed.to_dict() and plan.config.passes_text
    assert {"write", "load", "train", "validate"} <= set(plan.phases)
    alone = settings(pair, "sft", **{"train.compute_dtype": "fp32", "teacher.model": str(pair / "student")})
    learning = plan_for(alone)[0]
    assert plan.phases["train"] == learning.phases["train"] and plan.phases["load"] == learning.phases["load"]
    bigger = plan_for(settings(pair, **{"train.compute_dtype": "fp32", "rollout.max_new_tokens": 400}))[0]
    assert bigger.phases["write"] > plan.phases["write"]
    assert "alone" in " ".join(plan.notes)


@pytest.mark.parametrize("method", ["switch", "switch-paper", "sft", "kd", "gkd", "imitkd", "distillm", "skd",
                                    "adaswitch"])  # fmt: skip
def test_every_other_method_is_refused_before_any_weight_with_the_advice(pair, tmp_path, monkeypatch, method):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"tell me {i}", "response": "it is"}) + "\n" for i in range(9)))
    monkeypatch.setattr(load, "read_model", _refuse)
    config = settings(pair, method, **{"data.train": str(data)})
    for attempt in (
        lambda: run.distill(config, tmp_path / "run"), lambda: plan_for(config), lambda: run.rehearse(config),
    ):  # fmt: skip
        with pytest.raises(QSwitchError, match="Set method=seqkd, which learns from the teacher's text"):
            attempt()
    assert not (tmp_path / "run").exists()


def test_one_line_is_enough_and_the_student_is_merged_with_its_own_tokenizer(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["distill", "--teacher", str(pair / "teacher"), "--student", str(pair / "student"), "--method", "seqkd",
            "--data", str(pair / "data.jsonl"), "--set", "train.max_steps=2", "--set", "rollout.max_new_tokens=6",
            "--set", "data.num_validation=2", "--output-dir", "run"]  # fmt: skip
    assert command([*line, "--dry-run"]) == 0
    assert "while the teacher writes alone" in capsys.readouterr().out
    assert command(line) == 0
    shown = capsys.readouterr()
    assert "student.tokenizer=own: the tokenizers differ" in shown.err
    assert "as text" in shown.out and "bits/byte" in shown.out and "their tokenizers differ" in shown.out
    assert merge_run(tmp_path / "run", tmp_path / "merged").agrees
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.get_vocab() == AutoTokenizer.from_pretrained(pair / "student").get_vocab()
    assert merged.chat_template == STUDENT_TEMPLATE


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("switch", {"student.tokenizer": "own"}, "student.tokenizer=own cannot be combined with method=switch"),
        ("kd", {"student.tokenizer": "own"}, "student.tokenizer=own cannot be combined with method=kd"),
        ("seqkd", {"student.tokenizer": "own", "teacher.responses": "store"}, "teacher.responses holds tokens"),
        ("seqkd", {"student.tokenizer": "own", "teacher.residency": "swap"}, "teacher.residency has no effect"),
        ("seqkd", {"student.tokenizer": "own", "rollout.reuse": 2}, "rollout.reuse has no effect"),
        ("seqkd", {"student.tokenizer": "own", "rollout.steps_at_once": 2}, "rollout.steps_at_once has no effect"),
        ("seqkd", {"student.tokenizer": "theirs"}, "student.tokenizer"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(pair, method, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(pair, method, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.tokenizer": "shared"}, "different vocabularies"),
        ({"rollout.steps_at_once": 2}, "rollout.steps_at_once has no effect with student.tokenizer=own"),
        ({"data.end_tokens": ["<nowhere>"]}, "data.end_tokens names <nowhere>"),
        ({"data.template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
    ],
)
def test_what_does_not_fit_the_pair_is_refused_before_any_weight(pair, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(load, "read_model", _refuse)
    with pytest.raises(QSwitchError, match=message):
        run.distill(settings(pair, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_only_the_teachers_template_and_tokenizer_know_is_for_the_teacher(pair, tmp_path):
    changes = {"student.tokenizer": "own", "data.template_kwargs": {"polite": True}, "data.end_tokens": ["<|turn|>"]}
    config = settings(pair, **changes)
    prepared = prepare(config)
    assert prepared.prompts.train[0].text.startswith("please\n<|turn|>user\n")
    teacher, student = (AutoTokenizer.from_pretrained(pair / role) for role in ("teacher", "student"))
    assert teacher.convert_tokens_to_ids("<|turn|>") in prepared.pair.eos_ids
    files = [tmp_path / name for name in ("train.jsonl", "held_out.jsonl")]
    for file in files:
        file.write_text(json.dumps({"prompt": f"tell me {file.name}", "response": "the house"}) + "\n")
    half = prepare(student_half(config, files[:1], files[1:]))
    assert half.prompts.train[0].text == "<user>tell me train.jsonl<assistant>"
    assert half.pair.eos_ids == (student.eos_token_id,) and half.pair.tokenizer.get_vocab() == student.get_vocab()


def test_a_thought_that_the_teachers_prompt_opens_is_part_of_its_text(pair, tmp_path):
    shutil.copytree(pair / "teacher", tmp_path / "teacher")
    thinks = TEACHER_TEMPLATE.replace("<|turn|>assistant\n{% endif %}", "<|turn|>assistant\n<think>\n{% endif %}")
    (tmp_path / "teacher" / "chat_template.jinja").write_text(thinks)
    config = settings(pair, **{"teacher.model": str(tmp_path / "teacher"), "student.tokenizer": "own"})
    prepared = prepare(config)
    own = prepared.pair.tokenizer("it is what it is<|end|>", add_special_tokens=False)["input_ids"]
    asked = prepared.prompts.train[0]
    assert teacher_text.as_text(prepared.pair, asked, own) == ("<think>\nit is what it is", True)
    assert teacher_text.as_text(prepared.pair, asked, own[-1:]) == ("", True), "an empty response stays empty"


@pytest.mark.parametrize(("said", "end"), [("whole", True), ("cut", False), (None, True)])
def test_a_cut_response_has_no_end_and_only_the_teachers_response_is_learnt(pair, said, end):
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    said_by = (("user", "tell me"), ("assistant", "the house"), ("user", "again"), ("assistant", "a red house"))
    turns = [{"role": role, "content": text} for role, text in said_by]
    row = Row({"messages": turns} | ({"teacher_response": said} if said else {}), "here")
    record = record_of_row(row, 0, DataSection(train="data.jsonl"))
    prompt = PromptEncoder(tokenizer).encode(record)
    ids = tokenizer("a red house", add_special_tokens=False)["input_ids"]
    assert prompt.response_ids == [*ids, *([tokenizer.eos_token_id] if end else [])]
    assert bool(prompt.earlier_turns) == (said is None) and record.unused == ()
    with pytest.raises(DataError, match="whole or cut, found 'yes'"):
        record_of_row(Row({"prompt": "tell me", "teacher_response": "yes"}, "here"), 0, DataSection(train="data.jsonl"))


def test_a_store_of_tokens_is_refused_for_such_a_pair(pair, tmp_path):
    with pytest.raises(ConfigError, match="A store holds tokens of the teacher"):
        teach.teach(settings(pair), tmp_path / "store")

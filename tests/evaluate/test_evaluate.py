"""`qswitch eval` on tiny models: figures against direct computations, resuming, mistakes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rouge_score import rouge_scorer

import qswitch.evaluate.evaluate as evaluate_module
import qswitch.evaluate.write as write_module
from qswitch.cli import run
from qswitch.config import DataSection
from qswitch.evaluate.command import EvalRequest, run_eval
from qswitch.evaluate.subjects import find_subject
from qswitch.evaluate.testset import load_test_set
from tests.evaluate.runs import make_run, write_test_set
from tests.tiny import save_tiny_pair


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("eval")
    return make_run(folder).path, write_test_set(folder / "questions.jsonl")


def request(made, output_dir: Path, **changes) -> EvalRequest:
    run_path, data = made
    values = {
        "models": [str(run_path)], "data": [str(data)], "protocol": "paper", "template": "own", "seeds": "10,20",
        "max_new_tokens": 12, "columns": [], "batch_size": 4, "output_dir": output_dir,
    }  # fmt: skip
    return EvalRequest(**(values | changes))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_another_template_than_the_one_of_training_is_said(made, tmp_path):
    said: list[str] = []
    run_eval(request(made, tmp_path / "a", template=None, seeds="10", limit=1), say=said.append)
    assert any("is asked in alpaca" in line and "--template own" in line for line in said)
    said.clear()
    run_eval(request(made, tmp_path / "b", seeds="10", limit=1), say=said.append)
    assert not any("--template own" in line for line in said)


def test_figures_are_those_of_a_direct_computation(made, tmp_path):
    run_path, data = made
    models = [str(run_path), f"{run_path}:base", f"{run_path}:teacher"]
    results, folder = run_eval(request(made, tmp_path / "out", models=models), say=lambda _: None)
    records = lines(data)
    rows = lines(folder / "models/run/questions.jsonl")
    assert {(r["id"], r["seed"]) for r in rows} == {(i, s) for i in range(6) for s in (10, 20)}

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    by_record: dict[int, list[float]] = {}
    for row in rows:
        record = records[row["id"]]
        references = record.get("references") or ([record["output"]] if "output" in record else [])
        if not references:
            assert "rouge_l" not in row
            continue
        by_record.setdefault(row["id"], []).append(
            100 * max(scorer.score(r, row["response"])["rougeL"].fmeasure for r in references)
        )
    expected = sum(sum(v) / len(v) for v in by_record.values()) / len(by_record)
    found = results["sets"]["questions"]["models"]["run"]["metrics"]
    assert found["rouge_l"]["all"]["mean"] == pytest.approx(expected, abs=1e-12)
    assert found["rouge_l"]["all"]["records"] == 5
    # One token a character: the references have 3, 19, 36, ... of them.
    assert set(found["rouge_l"]) == {"all", "1-10", "11-50", "51+"}

    # KL and agreement from whole logits, one response at a time.
    student, teacher = find_subject(str(run_path)).load(), find_subject(f"{run_path}:teacher").load()
    tokenizer, total, agree, tokens = student.tokenizer, 0.0, 0, 0
    for row in lines(folder / "teacher/questions.jsonl"):
        record = records[row["id"]]
        extra = f"\n\n{record['input']}" if record["input"] else ""
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["instruction"] + extra}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([ids + row["response_ids"]])
        with torch.no_grad():
            p, q = (
                m.model.hf(input_ids=whole).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
                for m in (teacher, student)
            )
        total += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(row["response_ids"])
    assert found["kl_nats"]["all"]["mean"] == pytest.approx(total / tokens, rel=1e-4)
    assert found["top1_agreement"]["all"]["mean"] == pytest.approx(agree / tokens)

    # The student's own responses from whole logits, one at a time: the teacher reads what the student wrote.
    reverse, ratios, jsd = [], [], []
    for row in lines(folder / "models/run/questions.own.jsonl"):
        record = records[row["id"]]
        extra = f"\n\n{record['input']}" if record["input"] else ""
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": record["instruction"] + extra}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        written = torch.tensor(row["response_ids"])
        whole = torch.tensor([ids + row["response_ids"]])
        with torch.no_grad():
            p, q = (
                m.model.hf(input_ids=whole).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
                for m in (teacher, student)
            )
        m = ((p.exp() + q.exp()) / 2).log()
        reverse.append(float((q.exp() * (q - p)).sum(-1).mean()))
        jsd.append(float(((p.exp() * (p - m) + q.exp() * (q - m)).sum(-1) / 2).mean()) / math.log(2))
        ratios.append(float((p - q).gather(1, written[:, None]).mean()))
    for name, values in (
        ("own_reverse_kl_nats", reverse), ("own_jsd_bits", jsd), ("own_log_ratio_nats", ratios),
    ):  # fmt: skip
        assert found[name]["all"]["mean"] == pytest.approx(sum(values) / 6, rel=1e-3), name
    own = results["sets"]["questions"]["models"]["run"]["own"]
    assert 0 < own["response_tokens"] <= 12 and list(own["positions"]) == ["0-31"]

    against = results["sets"]["questions"]["models"]["run-teacher"]["metrics"]
    assert abs(against["own_reverse_kl_nats"]["all"]["mean"]) < 1e-6
    assert abs(against["kl_nats"]["all"]["mean"]) < 1e-6 and against["top1_agreement"]["all"]["mean"] == 1.0
    paired = results["sets"]["questions"]["differences"]["run-base"]
    base = results["sets"]["questions"]["models"]["run-base"]["metrics"]
    assert paired["kl_nats"]["all"]["mean"] == pytest.approx(
        base["kl_nats"]["all"]["mean"] - found["kl_nats"]["all"]["mean"]
    )
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert "template is that of the first model instead of alpaca" in table and "run-teacher" in table


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_fewer_rows_and_the_same_figures(
    made, tmp_path, monkeypatch
):
    expected, _ = run_eval(request(made, tmp_path / "roomy"), say=lambda _: None)
    tried: dict[str, list[int]] = {}

    def with_room_for(rows: int, module, name: str) -> None:
        real = getattr(module, name)

        def limited(*arguments, batch_size, **options):
            tried.setdefault(name, []).append(batch_size)
            if batch_size > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(*arguments, batch_size=batch_size, **options)

        monkeypatch.setattr(module, name, limited)

    with_room_for(2, write_module, "rollout")
    with_room_for(2, evaluate_module, "view_of")
    with_room_for(1, evaluate_module, "distances")
    said: list[str] = []
    found, _ = run_eval(request(made, tmp_path / "tight"), say=said.append)
    rows = tried["rollout"]
    assert rows[:2] == [4, 2] and rows == sorted(rows, reverse=True), "it does not try the larger again"
    assert tried["distances"] == [2, 1]
    assert tried["view_of"] == [2, 1], "of the teacher's responses, and then of the student's own"
    assert "out of memory: 4 -> 2 rows at a time" in said and "out of memory: 2 -> 1 rows at a time" in said
    ours, theirs = (r["sets"]["questions"]["models"]["run"]["metrics"] for r in (found, expected))
    assert ours["rouge_l"] == theirs["rouge_l"]
    assert ours["kl_nats"]["all"]["mean"] == pytest.approx(theirs["kl_nats"]["all"]["mean"], rel=1e-5)

    with_room_for(0, write_module, "rollout")
    with pytest.raises(torch.OutOfMemoryError):
        run_eval(request(made, tmp_path / "none"), say=lambda _: None)


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(made, tmp_path, monkeypatch):
    run_eval(request(made, tmp_path / "whole"), say=lambda _: None)

    monkeypatch.setattr(write_module, "CHUNK_ROWS", 1)
    written: list[int] = []
    real = write_module.rollout

    def stop_at_third(requests, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(requests))
        return real(requests, **options)

    small = request(made, tmp_path / "parts", batch_size=2)
    monkeypatch.setattr(write_module, "rollout", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_eval(small, say=lambda _: None)
    saved = tmp_path / "parts/teacher/questions.jsonl"
    assert len(lines(saved)) == 4
    with saved.open("a", encoding="utf-8") as handle:
        handle.write('{"id": 5, "resp')  # a crash in the middle of a line

    asked: list[int] = []

    def count(requests, **options):
        asked.extend(r.example_id for r in requests)
        return real(requests, **options)

    monkeypatch.setattr(write_module, "rollout", count)
    run_eval(small, say=lambda _: None)
    assert len(asked) == 2 + 6 * 3, "two teacher responses were missing, and all of the student's and its own"

    def contents(folder: Path) -> dict[str, list]:
        return {
            str(p.relative_to(folder)): sorted(lines(p), key=lambda r: (r["id"], r.get("seed", 0)))
            for p in sorted(folder.rglob("*.jsonl"))
        }

    assert contents(tmp_path / "parts").keys() == contents(tmp_path / "whole").keys()
    for name, rows in contents(tmp_path / "parts").items():
        for ours, theirs in zip(rows, contents(tmp_path / "whole")[name], strict=True):
            if "reverse_kl_nats" in ours:
                assert all(ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4) for key in theirs)
            else:
                assert ours == pytest.approx(theirs) if "kl_nats" in ours else ours == theirs

    # Finished: nothing is loaded any more.
    monkeypatch.setattr(write_module, "rollout", None)
    monkeypatch.setattr("qswitch.evaluate.subjects.Subject.load", None)
    run_eval(small, say=lambda _: None)


def test_other_weights_are_asked_again_and_other_settings_are_refused(made, tmp_path):
    folder = make_run(tmp_path)
    data = write_test_set(tmp_path / "questions.jsonl")
    here = (folder.path, data)
    run_eval(request(here, tmp_path / "out", no_teacher=True), say=lambda _: None)
    responses = tmp_path / "out/models/run/questions.jsonl"
    before = responses.read_text(encoding="utf-8")

    from safetensors.torch import load_file, save_file

    weights = folder.adapter_path / "adapter_model.safetensors"
    save_file({k: v * 30 for k, v in load_file(weights).items()}, weights)
    run_eval(request(here, tmp_path / "out", no_teacher=True), say=lambda _: None)
    assert responses.read_text(encoding="utf-8") != before

    arguments = ["eval", str(folder.path), "--data", str(data), "--output-dir", str(tmp_path / "out"), "--no-teacher"]
    assert run([*arguments, "--protocol", "greedy"]) == 2


def test_a_teacher_with_other_weights_under_the_same_name_is_measured_anew(tmp_path):
    folder = make_run(tmp_path)
    here = (folder.path, write_test_set(tmp_path / "questions.jsonl"))
    run_eval(request(here, tmp_path / "out"), say=lambda _: None)
    model = tmp_path / "out/models/run"
    before = {p.name: p.read_bytes() for p in model.iterdir()}

    from safetensors.torch import load_file, save_file

    weights = Path(folder.config.teacher.model) / "model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    run_eval(request(here, tmp_path / "out"), say=lambda _: None)
    after = {p.name: p.read_bytes() for p in model.iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    own = "questions.own.teacher.jsonl"
    assert changed == {"questions.teacher.jsonl", own, "teacher.txt"}, "the student's responses stay"


def test_a_template_with_other_content_is_another_evaluation(made, tmp_path, capsys):
    run_path, data = made
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[-1]['content'] }}:")
    arguments = ["eval", str(run_path), "--data", str(data), "--no-teacher", "--limit", "1", "--max-new-tokens", "2",
                 "--template", str(template), "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert run(arguments) == 0
    template.write_text("{{ messages[-1]['content'] }}?")
    assert run(arguments) == 2 and "template_content was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere/at/all", "--data", "x.jsonl"], "no such folder"),
        (["eval", "RUN", "--data", "missing.jsonl"], "does not exist"),
        (["eval", "RUN", "--data", "DATA", "--protocol", "papre"], "no protocol"),
        (["eval", "RUN", "--data", "DATA", "--seeds", "a,b"], "whole numbers"),
        (["eval", "RUN", "--data", "DATA", "--precision", "int3"], "choose one of"),
        (["eval", "RUN", "--data", "DATA", "--column", "response"], "field=column"),
        (["eval", "RUN", "RUN", "--data", "DATA"], "same name"),
        (["eval", "RUN", "--data", "DATA", "--data", "DATA"], "same file name"),
        (["eval", "RUN", "--data", "DATA", "--max-prompt-tokens", "2"], "Raise the one or lower the other"),
        (["eval", "RUN", "--data", "DATA", "--teacher", "x", "--no-teacher"], "contradict"),
        (["eval", "RUN", "--data", "DATA", "--template", "nowhere.jinja"], "no such file"),
    ],
)
def test_mistakes_end_with_2_and_one_message(made, arguments, message, capsys, tmp_path, monkeypatch):
    run_path, data = made
    monkeypatch.chdir(tmp_path)
    words = {"RUN": str(run_path), "DATA": str(data)}
    assert run([words.get(a, a) for a in arguments] + ["--output-dir", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


def test_questions_that_the_run_was_trained_on_are_reported(made, tmp_path):
    run_path, _ = made
    data = tmp_path / "seen.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": "x"}) + "\n" for p in ("Tell  the", "unheard of")))
    said: list[str] = []
    wanted = request((run_path, data), tmp_path / "out", no_teacher=True)
    results, _ = run_eval(wanted, say=said.append)
    assert results["overlaps_with_training"] == {"seen": {"run": 1}}
    assert any("1 of 2 prompts are also in the training data of run" in line for line in said)
    table = tmp_path / "out/results.md"
    assert "## seen (2 records)\n\n1 of 2 prompts are also in the training data of run," in table.read_text("utf-8")
    # Whoever reads the folder later knows it too, also of models that a later call does not name; as `compare` does.
    run_eval(replace(wanted, models=[f"{run_path}:base"]), say=said.append)
    kept = json.loads((tmp_path / "out/sets/seen.json").read_text(encoding="utf-8"))
    assert kept["overlaps_with_training"] == {"run": 1} and kept["left_out"] == 0
    assert "training data" not in table.read_text("utf-8")


def test_of_a_set_no_more_is_read_than_is_asked(tmp_path):
    """A line behind the limit that cannot be read would be an error; a set of millions would be read to its end."""
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "references": ["d", "e"]}\nno JSON\n')
    test_set = load_test_set(DataSection(train=str(path)), str(path), limit=2)
    assert [one.references for one in test_set.records] == [("b",), ("d", "e")]


def test_prompt_and_response_stay_within_the_context_of_the_models(tmp_path, capsys):
    """GPT-2 has learned positions: one more than it has is an index error."""
    teacher, student = save_tiny_pair(tmp_path / "gpt2", "gpt2", n_positions=64)
    run_dir = make_run(tmp_path, teacher__model=str(teacher), student__model=str(student), data__max_prompt_tokens=50)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": "x" * n, "response": "y"}) + "\n" for n in (5, 40)))
    command = ["eval", str(run_dir.path), "--data", str(tmp_path / "t.jsonl"), "--output-dir", str(tmp_path / "eval")]
    assert run([*command, "--max-new-tokens", "16"]) == 0
    said = capsys.readouterr().err
    assert "left out 1 records whose prompt has more than 48 tokens, since the shortest context" in said
    assert run([*command, "--max-new-tokens", "100000"]) == 2
    assert "is 64 tokens, the prompt included. Give less." in capsys.readouterr().err

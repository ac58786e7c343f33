"""What the student of a run answers, alone, beside its teacher, in a conversation, and at the end of its context."""

from __future__ import annotations

import json

import pytest
import torch

from qswitch.cli import run
from qswitch.data.template import PromptEncoder
from qswitch.data.turns import Message
from qswitch.errors import ConfigError, ModelError
from qswitch.rollout import generate
from qswitch.rollout.chat import Chat
from qswitch.rollout.generate import Answerer, generate_from_run, read_prompts
from qswitch.rollout.policy import StudentPolicy, TeacherPolicy
from tests.evaluate.runs import make_run
from tests.tiny import save_tiny_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("generate"), rollout__decay_rate=3.0).path  # the teacher steps in early


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A GPT-2 pair, whose learned positions end at 64: a longer sequence is an index error there."""
    root = tmp_path_factory.mktemp("short")
    teacher, student = save_tiny_pair(root / "gpt2", "gpt2", n_positions=64)
    return make_run(root, teacher__model=str(teacher), student__model=str(student), data__max_prompt_tokens=50).path


def ask(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def test_an_answer_depends_on_prompt_and_seed_alone(folder):
    one, two = generate_from_run(folder, ["tell fox", "tell dog"])
    assert generate_from_run(folder, ["tell fox"])[0] == one and one.text != two.text
    assert generate_from_run(folder, ["tell fox"], seed=1)[0] != one
    assert {token.writer for token in one.tokens} == {"student"} and len(one.tokens) <= 10


def test_the_teacher_takes_part_where_writers_are_shown(folder):
    [mixed] = generate_from_run(folder, ["tell fox"], show_writers=True, seed=3)
    assert "teacher" in {token.writer for token in mixed.tokens}


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_one_gets_what_is_left(short, caplog):
    with pytest.raises(ConfigError, match=r"Prompt 1 has 7\d tokens, and the context of the models is 64"):
        generate_from_run(short, ["x" * 55])
    [answer] = generate_from_run(short, ["x" * 37], temperature=0)
    assert 0 < len(answer.tokens) < 10 and "may be cut at the end of the context of 64 tokens" in caplog.text


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--temperature", "nan"], "number from 0"),
        (["--temperature", "inf"], "number from 0"),
        (["--max-new-tokens", "100000"], "context of the models is 512"),
        (["--max-new-tokens", "1000000000"], "1048576"),
        (["--prompts", "gone.txt"], "either --prompt"),
        (["--output", "out.jsonl"], "--output takes"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_read(folder, capsys, monkeypatch, option, words):
    monkeypatch.setattr("qswitch.rollout.generate.load_student", None)
    assert run(["generate", str(folder), "--prompt", "tell fox", *option]) == 2
    assert words in capsys.readouterr().err


def test_prompts_of_a_file_are_answered_into_a_file(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("tell fox\n\ntell dog\n")
    out = tmp_path / "out.jsonl"
    assert run(["generate", str(folder), "--prompts", str(tmp_path / "p.txt"), "--output", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = generate_from_run(folder, ["tell fox", "tell dog"])
    assert [(x["prompt"], x["text"]) for x in lines] == [
        ("tell fox", expected[0].text),
        ("tell dog", expected[1].text),
    ]
    assert run(["generate", str(folder), "--prompts", str(tmp_path / "p.txt"), "--output", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


COLUMNS = {"instruction": "frage", "input": "dazu", "response": "antwort"}


@pytest.fixture(scope="module")
def german(tmp_path_factory):
    """A run whose data has columns of other names, with a prompt in two halves and a system prompt."""
    root = tmp_path_factory.mktemp("german")
    return make_run(root, data__columns=COLUMNS, data__template="alpaca", data__system_prompt="Sei kurz.").path


def test_records_are_read_and_asked_as_the_run_was_trained(german, tmp_path, capsys, monkeypatch):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"frage": "tell", "dazu": "the fox"}) + "\n")  # no answer, as of what is only asked
    asked = []
    encode = PromptEncoder.encode
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, r: asked.append(self.render(r)) or encode(self, r))
    assert run(["generate", str(german), "--prompts", str(file), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert asked[0].endswith("### Instruction:\ntell\n\n### Input:\nthe fox\n\n### Response:\n")
    assert asked[0].startswith("Sei kurz.")
    file.write_text(json.dumps({"prompt": "tell fox"}) + "\n")  # which has none of the run's columns
    [record] = read_prompts(file, german)
    assert [turn.content for turn in record.messages] == ["Sei kurz.", "tell fox"]


def test_what_a_record_says_beside_its_turns_is_asked_too(folder, tmp_path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    line = {"messages": [{"role": "user", "content": "tell"}], "tools": [tool], "chat_template_kwargs": {"a": 1}}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    [record] = read_prompts(tmp_path / "p.jsonl", folder)
    assert record.tools[0]["function"]["name"] == "weather" and record.template_kwargs == {"a": 1}


def test_what_a_model_writes_cannot_steer_the_terminal():
    from qswitch.terminal import printable

    assert printable("a\x1b[2Jb\tc\n\x07\x9b") == "a\\x1b[2Jb\tc\n\\x07\\x9b"


def converse(path, lines, **options) -> str:
    """What a conversation of these lines shows."""
    left = iter(lines)

    def read(_prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    shown: list[str] = []

    def show(generation, by_writer: bool) -> None:
        shown.append(f"{generation.text} (by writer)" if by_writer else generation.text)

    Chat(path, say=shown.append, show=show, read=read, **options).converse()
    return "\n".join(shown)


def test_a_conversation_remembers_its_turns_and_the_teacher_is_not_part_of_it(folder):
    shown = converse(folder, ["tell fox", "/teacher", "tell dog", "/quit"])
    answers = Answerer(folder)
    question = answers.as_record(0, ask("tell fox"))
    [first] = answers.answer([question], StudentPolicy(), first_id=0)
    [teacher] = answers.answer([question], TeacherPolicy(), first_id=1)
    history = (*ask("tell fox"), Message("assistant", first.text), *ask("tell dog"))
    [second] = answers.answer([answers.as_record(0, history)], StudentPolicy(), first_id=2)
    assert shown.endswith("\n".join(["", first.text, "[teacher]", teacher.text, second.text]))


def test_a_conversation_longer_than_the_context_forgets_its_oldest_turns(short):
    shown = converse(short, ["a" * 20, "b" * 20], temperature=0)
    assert "forgot the oldest 1 turns" in shown


def test_a_question_that_cannot_be_answered_does_not_end_the_conversation(short):
    shown = converse(short, ["/again", "/nothing", "x" * 80, "hi", "/writers", "hi", "/new", "/help"])
    assert "Ask something first" in shown and "There is no /nothing" in shown and "Shorten it" in shown
    assert "(by writer)" in shown and "/quit" in shown


def test_responses_that_do_not_fit_together_are_written_by_fewer_at_a_time(folder, monkeypatch, caplog):
    expected = generate_from_run(folder, ["tell fox", "tell dog", "tell lazy"])
    written, tried = generate.rollout, []

    def cramped(*args, batch_size, **options):
        tried.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return written(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(generate, "rollout", cramped)
    assert generate_from_run(folder, ["tell fox", "tell dog", "tell lazy"]) == expected
    assert tried == [4, 2, 1] and "out of memory: 2 -> 1 rows" in caplog.text


@pytest.mark.parametrize("error", [ModelError("the teacher is gone"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_a_teacher_that_cannot_be_read_does_not_end_the_conversation(folder, monkeypatch, error):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(generate, "load_teacher", fail)
    shown = converse(folder, ["tell fox", "/teacher", "tell dog"])
    assert str(error) in shown and second_answer(folder) in shown


def second_answer(folder) -> str:
    """What the student says to the second question."""
    answers = Answerer(folder)
    [first] = answers.answer([answers.as_record(0, ask("tell fox"))], StudentPolicy(), first_id=0)
    history = (*ask("tell fox"), Message("assistant", first.text), *ask("tell dog"))
    [second] = answers.answer([answers.as_record(0, history)], StudentPolicy(), first_id=1)
    return second.text

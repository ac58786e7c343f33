"""Both models read the same ids: templates, prefix property, end tokens, limits, padding."""

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qswitch.data.records import Record
from qswitch.data.template import PromptEncoder, pad_left, template_source
from qswitch.data.turns import Message
from qswitch.errors import DataError

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, chat_template=None, bos=False, eos="<|end|>"):
    """One token a byte, no network; with `bos`, <s> goes before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token="<s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = chat_template
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    return tokenizer


def record(text="Hi", response=None, *, id=0, **fields):
    return Record(id, (Message("user", text),), response, f"f.jsonl line {id + 1}", **fields)


def test_chat_template_prompt_is_a_prefix_of_the_conversation():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    prompt = PromptEncoder(tokenizer, "teacher").encode(record("Hi", "Hello"))
    assert prompt.text == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(prompt.prompt_ids) == prompt.text
    assert tokenizer.decode(prompt.response_ids) == "Hello<|end|>"  # the line break after the end token is not ours
    assert prompt.response_ids[-1] == tokenizer.eos_token_id


def test_teacher_and_student_read_the_template_of_the_tokenizer_given():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    assert PromptEncoder(tokenizer, "teacher").encode(record()) == PromptEncoder(tokenizer, "student").encode(record())


def test_template_that_opens_the_answer_otherwise_still_ends_the_response():
    thinking = CHAT.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    tokenizer = byte_tokenizer(chat_template=thinking)
    prompt = PromptEncoder(tokenizer).encode(record("Hi", "Hello"))
    assert tokenizer.decode(prompt.response_ids) == "Hello<|end|>"


def test_end_of_turn_other_than_eos_ends_the_response():
    tokenizer = byte_tokenizer(chat_template=CHAT, eos="</s>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert PromptEncoder(tokenizer, end_token_ids=[end]).encode(record("Hi", "Yo")).response_ids[-1] == end
    assert PromptEncoder(tokenizer).encode(record("Hi", "Yo")).response_ids[-1] == tokenizer.eos_token_id


def test_alpaca_is_the_exact_text():
    encoder = PromptEncoder(byte_tokenizer(), "alpaca")
    assert encoder.render(record("Add 1 and 2.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    )
    with_input = record("Add.\n\n1 and 2", instruction="Add.", input="1 and 2")
    assert encoder.render(with_input) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )


def test_base_model_falls_back_to_alpaca_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        encoder = PromptEncoder(byte_tokenizer(), "teacher")
        encoder.encode_batch([record(), record(id=1)])
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == ["The tokenizer has no chat template"]
    assert encoder.encode(record()) == PromptEncoder(byte_tokenizer(), "alpaca").encode(record())


@pytest.mark.parametrize(("template", "text"), [("alpaca", "Hi"), ("plain", "Hi"), ("plain", "<s>Hi")])
def test_one_start_token_and_never_two(template, text):
    tokenizer = byte_tokenizer(bos=True)
    prompt = PromptEncoder(tokenizer, template).encode(record(text, "Yo"))
    assert prompt.prompt_ids[0] == tokenizer.bos_token_id
    assert prompt.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt.response_ids) == "Yo<|end|>"


def test_chat_template_that_writes_the_start_token_gets_no_second():
    tokenizer = byte_tokenizer(bos=True, chat_template="{{ bos_token }}" + CHAT)
    assert PromptEncoder(tokenizer).encode(record()).prompt_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", ["teacher", "alpaca", "plain"])
@pytest.mark.parametrize("bos", [False, True])
def test_exported_template_renders_what_was_trained(template, bos):
    tokenizer = byte_tokenizer(bos=bos, chat_template=CHAT if template == "teacher" else None)
    encoder = PromptEncoder(tokenizer, template)
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("user", "Why?")]
    for messages in (turns, turns[1:], turns[-1:]):
        one = Record(0, tuple(Message(*m) for m in messages), "So", "f")
        prompt = encoder.encode(one)
        dicts = [{"role": r, "content": c} for r, c in messages]

        def ids(turns, generation):
            text = tokenizer.apply_chat_template(
                turns, chat_template=template_source(encoder), tokenize=False, add_generation_prompt=generation
            )
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        assert ids(dicts, True) == prompt.prompt_ids
        whole = ids([*dicts, {"role": "assistant", "content": "So"}], False)
        expected = prompt.prompt_ids + prompt.response_ids
        assert whole[: len(expected)] == expected


def test_jinja_file(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("Q: {{ messages[-1].content }}\nA:", encoding="utf-8")
    encoder = PromptEncoder(byte_tokenizer(), str(file))
    assert encoder.encode(record()).text == "Q: Hi\nA:"
    assert template_source(encoder) == file.read_text(encoding="utf-8")


def test_bad_templates(tmp_path):
    with pytest.raises(DataError, match=r"data\.template=.*none\.jinja: no such file.*alpaca, plain"):
        PromptEncoder(byte_tokenizer(), str(tmp_path / "none.jinja"))
    file = tmp_path / "bad.jinja"
    file.write_text("{% for %}")
    with pytest.raises(DataError, match="not a usable chat template"):
        PromptEncoder(byte_tokenizer(), str(file))
    file.write_text("nothing of the user")
    with pytest.raises(DataError, match="leaves out the user's turn"):
        PromptEncoder(byte_tokenizer(), str(file))


def test_template_that_refuses_a_record_names_its_line():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    encoder = PromptEncoder(byte_tokenizer(chat_template=strict))
    bad = Record(0, (Message("system", "s"), Message("user", "u")), None, "f.jsonl line 9")
    with pytest.raises(DataError, match=r"f\.jsonl line 9: the chat template refuses.*no system.*data\.system_prompt"):
        encoder.encode(bad)


def test_response_without_any_end_token_is_refused():
    with pytest.raises(DataError, match=r"f\.jsonl line 1: the tokenizer has no end-of-sequence token"):
        PromptEncoder(byte_tokenizer(eos=None), "plain").encode(record("Hi", "Yo"))


def test_batch_equals_single():
    encoder = PromptEncoder(byte_tokenizer(chat_template=CHAT))
    records = [record("Hi", "Yo"), record("There", id=1), record("Now", "é ü", id=2)]
    assert encoder.encode_batch(records) == [encoder.encode(r) for r in records]


def test_pad_left():
    input_ids, mask = pad_left([[1, 2, 3], [4]], pad_id=9)
    assert torch.equal(input_ids, torch.tensor([[1, 2, 3], [9, 9, 4]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1], [0, 0, 1]]))
    assert input_ids.dtype == mask.dtype == torch.long
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one row"):
            pad_left(rows, 0)


def test_earlier_assistant_turns_are_marked_with_their_end_token():
    tokenizer = byte_tokenizer(chat_template=CHAT)
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?"), Message("assistant", "No"),
             Message("user", "Bye"))  # fmt: skip
    prompt = PromptEncoder(tokenizer, "teacher").encode(Record(0, turns, "See you", "f.jsonl line 1"))
    texts = [tokenizer.decode(prompt.prompt_ids[start:end]) for start, end in prompt.earlier_turns]
    assert texts == ["Hello<|end|>", "No<|end|>"]
    assert tokenizer.decode(prompt.response_ids) == "See you<|end|>"


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_earlier_turns_of_the_plain_templates_hold_what_the_assistant_said(template):
    tokenizer = byte_tokenizer(bos=True)
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?"))
    prompt = PromptEncoder(tokenizer, template).encode(Record(0, turns, "No", "f.jsonl line 1"))
    assert [tokenizer.decode(prompt.prompt_ids[a:b]) for a, b in prompt.earlier_turns] == ["Hello"]


def test_a_template_that_rewrites_earlier_turns_leaves_them_as_context():
    """Templates that drop the thinking of earlier turns print them otherwise than they were written."""
    rewriting = CHAT.replace("{{ m.content }}", "{% if loop.last %}{{ m.content }}{% else %}...{% endif %}")
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "And?"))
    encoder = PromptEncoder(byte_tokenizer(chat_template=rewriting), "teacher")
    assert encoder.encode(Record(0, turns, "No", "f.jsonl line 1")).earlier_turns == ()

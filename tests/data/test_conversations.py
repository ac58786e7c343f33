"""Conversations of today in the templates of today's families: the ids are those of `apply_chat_template`, and of the
assistant's turns exactly the right tokens are learned.

The templates beside this file have the structure of the published ones; the tokenizer has one token a byte and the
families' special tokens.
"""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qswitch.config import DataSection
from qswitch.data.records import load_records
from qswitch.data.template import PromptEncoder, template_source
from qswitch.data.template_checks import warn_of_thinking
from qswitch.errors import DataError
from qswitch.layers import build_config, by_section

TEMPLATES = Path(__file__).parent / "templates"
ENDS = {"qwen3": "<|im_end|>", "llama-3.1": "<|eot_id|>", "gemma-3": "<end_of_turn>", "smollm2": "<|im_end|>",
        "deepseek-r1": "<|end_of_sentence|>", "qwen3-thinking": "<|im_end|>"}  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
           "<end_of_turn>", "<|end_of_sentence|>"]  # fmt: skip


def tokenizer_of(family, eos=None):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token=eos or ENDS[family], pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number"}}},
    },
}
ASKS = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 1.5}}}


def turn(role, content, **extra):
    return {"role": role, "content": content, **extra}


CONVERSATIONS = {
    "one turn": {"messages": [turn("user", "Hi"), turn("assistant", "Hello.")]},
    "system and several turns": {
        "messages": [turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello."),
                     turn("user", "Why?"), turn("assistant", "So.")]
    },
    "no thinking, by the row": {
        "messages": [turn("user", "Hi"), turn("assistant", "Hello.")],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "thinking": {"messages": [turn("user", "2 + 2?"), turn("assistant", "4", reasoning_content="Two and two.")]},
    "thinking in several turns": {
        "messages": [turn("user", "2 + 2?"), turn("assistant", "4", reasoning_content="Two and two."),
                     turn("user", "3 + 3?"), turn("assistant", "6", reasoning_content="Three and three.")]
    },
    "a call": {
        "messages": [turn("user", "Warm?"), turn("assistant", "", tool_calls=[ASKS])],
        "tools": [WEATHER],
    },
    "a call and its answer": {
        "messages": [turn("system", "Be brief."), turn("user", "Warm?"), turn("assistant", "", tool_calls=[ASKS]),
                     turn("tool", '{"degrees": 21}', name="weather"), turn("assistant", "Yes, 21 °C.")],
        "tools": [WEATHER],
    },
}  # fmt: skip
READ = {
    "qwen3": list(CONVERSATIONS),
    "llama-3.1": ["one turn", "system and several turns", "a call", "a call and its answer"],
    "gemma-3": ["one turn", "system and several turns"],
    "smollm2": ["one turn", "system and several turns"],
}
CASES = [(family, name) for family, names in READ.items() for name in names]


def read(tmp_path, row, **settings):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = DataSection(train=str(path), **settings)
    (record,) = load_records(data, data.train)
    return record


def rendered(tokenizer, turns, row, generation, **options):
    text = tokenizer.apply_chat_template(
        turns, tools=row.get("tools"), tokenize=False, add_generation_prompt=generation,
        **{**row.get("chat_template_kwargs", {}), **options},
    )  # fmt: skip
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def learned(tokenizer, prompt):
    """What the loss runs over, as text: the earlier turns that can be told, and the response."""
    spans = [prompt.prompt_ids[start:end] for start, end in prompt.earlier_turns]
    return [tokenizer.decode(ids) for ids in (*spans, prompt.response_ids)]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ids_are_those_of_apply_chat_template(tmp_path, family, name):
    row, tokenizer = CONVERSATIONS[name], tokenizer_of(family)
    prompt = PromptEncoder(tokenizer).encode(read(tmp_path, row))
    *before, _ = row["messages"]
    assert prompt.prompt_ids == rendered(tokenizer, before, row, True)
    whole = rendered(tokenizer, row["messages"], row, False)
    said = prompt.prompt_ids + prompt.response_ids
    assert whole[: len(said)] == said
    assert tokenizer.decode(whole[len(said) :]).strip() == "", "nothing but a line break after the end of turn"
    assert said[-1] == tokenizer.eos_token_id
    assert prompt.left_out == ()


THOUGHT = "<think>\n{}\n</think>\n\n{}<|im_end|>"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 1.5}}\n</tool_call><|im_end|>'
LEARNED = {
    ("qwen3", "one turn"): [THOUGHT.format("", "Hello.")],
    ("qwen3", "no thinking, by the row"): ["Hello.<|im_end|>"],
    ("qwen3", "thinking"): [THOUGHT.format("Two and two.", "4")],
    # The template drops the thinking of turns before the last question: they are read, and not learned.
    ("qwen3", "thinking in several turns"): [THOUGHT.format("Three and three.", "6")],
    ("qwen3", "a call"): ["<think>\n\n</think>\n\n" + CALL],
    ("qwen3", "a call and its answer"): [CALL, THOUGHT.format("", "Yes, 21 °C.")],
    ("llama-3.1", "a call"): ['{"name": "weather", "parameters": {"city": "Zürich", "days": 1.5}}<|eot_id|>'],
    ("llama-3.1", "a call and its answer"): [
        '{"name": "weather", "parameters": {"city": "Zürich", "days": 1.5}}<|eot_id|>',
        "Yes, 21 °C.<|eot_id|>",
    ],
    ("gemma-3", "system and several turns"): ["Hello.<end_of_turn>", "So.<end_of_turn>"],
    ("smollm2", "system and several turns"): ["Hello.<|im_end|>", "So.<|im_end|>"],
}


@pytest.mark.parametrize(("family", "name"), LEARNED)
def test_which_tokens_are_learned(tmp_path, family, name):
    tokenizer = tokenizer_of(family)
    prompt = PromptEncoder(tokenizer).encode(read(tmp_path, CONVERSATIONS[name]))
    assert learned(tokenizer, prompt) == LEARNED[family, name]


@pytest.mark.parametrize("name", ["one turn", "system and several turns"])
def test_thinking_switched_off_by_the_setting(tmp_path, name):
    row, tokenizer = CONVERSATIONS[name], tokenizer_of("qwen3")
    encoder = PromptEncoder(tokenizer, template_kwargs={"enable_thinking": False})
    prompt = encoder.encode(read(tmp_path, row))
    assert prompt.prompt_ids == rendered(tokenizer, row["messages"][:-1], row, True, enable_thinking=False)
    assert learned(tokenizer, prompt)[-1] in ("Hello.<|im_end|>", "So.<|im_end|>")
    thinks = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    assert encoder.encode(read(tmp_path, thinks)).prompt_ids == rendered(tokenizer, row["messages"][:-1], thinks, True)


ANSWERS = {
    "thought": turn("assistant", "<think>\nTwo and two.\n</think>\n\n4"),
    "none": turn("assistant", "4"),
    "apart": turn("assistant", "4", reasoning_content="Two and two."),
}


@pytest.mark.parametrize("merges", [[], ["\n\n"]])
@pytest.mark.parametrize(
    ("family", "answer", "expected"),
    [
        ("deepseek-r1", "thought", "Two and two.\n</think>\n\n4<|end_of_sentence|>"),
        ("deepseek-r1", "none", "4<|end_of_sentence|>"),
        ("qwen3-thinking", "thought", "Two and two.\n</think>\n\n4<|im_end|>"),
        ("qwen3-thinking", "apart", "Two and two.\n</think>\n\n4<|im_end|>"),
        ("qwen3-thinking", "none", "\n</think>\n\n4<|im_end|>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_gone_on_with(tmp_path, family, answer, expected, merges):
    """Also where two newlines are one token, so that the whole does not begin with the prompt's ids."""
    tokenizer = tokenizer_of(family)
    tokenizer.add_tokens(merges)
    prompt = PromptEncoder(tokenizer).encode(read(tmp_path, {"messages": [turn("user", "2 + 2?"), ANSWERS[answer]]}))
    assert prompt.text.endswith("<think>\n")
    assert tokenizer.decode(prompt.response_ids) == expected


@pytest.mark.parametrize(
    ("family", "answer", "changes", "said"),
    [
        ("deepseek-r1", "none", {"method": "sft"}, "inside of its thought"),
        ("deepseek-r1", "none", {"method": "kd"}, "inside of its thought"),
        ("deepseek-r1", "thought", {"method": "sft"}, None),
        ("qwen3-thinking", "none", {"method": "sft"}, None),
        ("smollm2", "none", {"method": "sft"}, None),
        ("deepseek-r1", "none", {"method": "gkd", "data.ground_truth_mix": 0.0}, "makes the models think"),
        ("deepseek-r1", "none", {"method": "gkd", "data.ground_truth_mix": 0.0, "rollout.max_new_tokens": 2048}, None),
        ("qwen3", "none", {"method": "gkd", "data.ground_truth_mix": 0.0}, "lets the models think"),
        ("smollm2", "none", {"method": "gkd", "data.ground_truth_mix": 0.0}, None),
    ],
)
def test_what_thinking_does_to_the_run_is_said(tmp_path, caplog, family, answer, changes, said):
    pair = {"teacher": {"model": "big/one"}, "student": {"model": "small/one"}, "data": {"train": "x.jsonl"}}
    record = read(tmp_path, {"messages": [turn("user", "2 + 2?"), ANSWERS[answer]]})
    warn_of_thinking(build_config(pair, by_section(changes)), PromptEncoder(tokenizer_of(family)), [record])
    assert not caplog.messages if said is None else said in " ".join(caplog.messages)


def test_the_exported_template_keeps_what_the_setting_said(tmp_path):
    tokenizer = tokenizer_of("qwen3")
    prompt = PromptEncoder(tokenizer, template_kwargs={"enable_thinking": False}).encode(
        read(tmp_path, CONVERSATIONS["one turn"])
    )
    exported = tokenizer_of("qwen3")
    exported.chat_template = template_source(PromptEncoder(tokenizer, template_kwargs={"enable_thinking": False}))
    turns = [turn("user", "Hi")]
    assert rendered(exported, turns, {}, True) == prompt.prompt_ids
    assert rendered(exported, turns, {}, True, enable_thinking=True) == rendered(tokenizer, turns, {}, True)


def test_shapes_of_tool_calls_say_the_same(tmp_path):
    """OpenAI's logs have arguments as text, ShareGPT's turns a role function_call, csv everything as text."""
    usual = CONVERSATIONS["a call and its answer"]
    encoder = PromptEncoder(tokenizer_of("qwen3"))
    expected = encoder.encode(read(tmp_path, usual))
    arguments = json.dumps(ASKS["function"]["arguments"])
    as_text = json.loads(json.dumps(usual))
    as_text["messages"][2]["tool_calls"][0]["function"]["arguments"] = arguments
    as_text["messages"][2]["content"] = None
    shared = {
        "system": "Be brief.",
        "tools": json.dumps([WEATHER]),
        "conversations": [
            {"from": "human", "value": "Warm?"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "weather", "arguments": ASKS["function"]["arguments"]}),
            },
            {"from": "observation", "value": '{"degrees": 21}'},
            {"from": "gpt", "value": "Yes, 21 °C."},
        ],
    }
    csv = {"messages": json.dumps(usual["messages"]), "tools": json.dumps([WEATHER])}
    for row in (as_text, shared, csv):
        found = encoder.encode(read(tmp_path, row))
        assert (found.prompt_ids, found.response_ids) == (expected.prompt_ids, expected.response_ids)


def test_a_cell_whose_json_is_nested_too_deep_is_a_record_to_mend(tmp_path):
    row = {"messages": [turn("user", "Warm?"), turn("assistant", "Yes.")], "tools": "[" * 100_000}
    with pytest.raises(DataError, match=r"line 1.*tools is nested too deep"):
        read(tmp_path, row)


def test_parquet_fills_no_nulls_into_tools(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    other = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
    row = {**CONVERSATIONS["a call and its answer"], "tools": [WEATHER, other]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (record,) = load_records(DataSection(train="x"), str(tmp_path / "a.parquet"))
    encoder = PromptEncoder(tokenizer_of("qwen3"))
    assert sorted(encoder.encode(record).text) == sorted(encoder.encode(read(tmp_path, row)).text)
    assert "null" not in encoder.encode(record).text


def test_what_no_template_reads_is_named(tmp_path):
    row = {
        **CONVERSATIONS["thinking"], "tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": False},
        "rating": 5, "empty": "",
    }  # fmt: skip
    record = read(tmp_path, row)
    assert record.unused == ("rating",)
    left_out = PromptEncoder(tokenizer_of("gemma-3")).encode(record).left_out
    assert left_out == ("turns.reasoning_content", "chat_template_kwargs.enable_thinking", "tools")
    # Qwen's reads all three, but a prompt that has ended the thinking leaves no place for the response's.
    assert PromptEncoder(tokenizer_of("qwen3")).encode(record).left_out == ("turns.reasoning_content",)


@pytest.mark.parametrize("template", ["alpaca", "plain", "teacher"])
def test_turns_that_would_be_left_out_are_refused(tmp_path, template):
    encoder = PromptEncoder(tokenizer_of("smollm2"), template)
    with pytest.raises(DataError, match=r"a\.jsonl line 1: .*no place for tool_calls.*data\.template"):
        encoder.encode(read(tmp_path, CONVERSATIONS["a call"]))
    tool = {"messages": [turn("user", "Hi"), turn("tool", "21"), turn("assistant", "Yes")]}
    silent = tokenizer_of("smollm2")
    silent.chat_template = silent.chat_template.replace("in messages %}", "in messages if message.role != 'tool' %}")
    for one in (PromptEncoder(silent), *([encoder] if template != "teacher" else [])):
        with pytest.raises(DataError, match=r"line 1: .*a tool's turn, which the template leaves out"):
            one.encode(read(tmp_path, tool))


def test_a_setting_that_the_template_does_not_read_is_refused():
    with pytest.raises(DataError, match=r"data\.template_kwargs\.enable_thinkin: .*Did you mean enable_thinking\?"):
        PromptEncoder(tokenizer_of("qwen3"), template_kwargs={"enable_thinkin": False})
    with pytest.raises(DataError, match=r"data\.template_kwargs\.enable_thinking: .*does not read it\. Remove it"):
        PromptEncoder(tokenizer_of("gemma-3"), template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("family", ENDS)
def test_the_token_that_closes_a_turn(family):
    tokenizer = tokenizer_of(family, eos="<eos>")
    closing = PromptEncoder(tokenizer).closing_token_id()
    assert tokenizer.convert_ids_to_tokens(closing) == ENDS[family]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert PromptEncoder(tokenizer).closing_token_id() is None
    assert PromptEncoder(tokenizer, "alpaca").closing_token_id() is None


PAIRS = [
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"chosen and a rejected answer.*data\.columns\.response=chosen"),
    (
        {
            "chosen": [turn("user", "a"), turn("assistant", "b")],
            "rejected": [turn("user", "a"), turn("assistant", "c")],
        },
        r"chosen and a rejected answer.*data\.columns\.messages=chosen",
    ),
    ({"prompt": "a", "completion": "b", "label": True}, r"a label that is true or false.*columns\.response=completion"),
]


@pytest.mark.parametrize(("row", "reason"), PAIRS)
def test_preferences_are_used_as_somebody_says_or_refused(tmp_path, row, reason):
    with pytest.raises(DataError, match=rf"a\.jsonl line 1: .*{reason}"):
        read(tmp_path, row)
    field, column = ("messages", "chosen") if "prompt" not in row else ("response", list(row)[1])
    record = read(tmp_path, row, columns={field: column})
    assert (record.messages[-1].content, record.response) == ("a", "b")
    assert record.unused == tuple(name for name in ("rejected", "label") if name in row)

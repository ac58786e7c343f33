"""Prompts that are in two data sets are found, however they are laid out."""

import json

from qswitch.config import DataSection
from qswitch.data.overlap import seen_in_training
from qswitch.data.records import load_records


def test_the_same_prompt_is_found_in_another_format_case_and_spacing(tmp_path):
    train = tmp_path / "train.jsonl"
    rows = [
        {"instruction": "Sum up.", "input": "A  text.", "output": "T"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
        {"prompt": "Never asked again"},
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = tmp_path / "test.csv"
    test.write_text('question\n"sum up.\n\na text."\nWhy not?\nWHY?\n')
    data = DataSection(train=str(train))
    records = load_records(DataSection(train=str(test)), str(test))
    assert seen_in_training(data, records) == {0, 2}
    assert seen_in_training(DataSection(train=str(train), limit=1), records) == {0}


def test_a_limit_counts_as_in_training_where_entries_have_weights(tmp_path):
    """What is seen are the prompts that gathering finds, of each entry with weights and of all together without."""
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for file in files:
        file.write_text("".join(json.dumps({"prompt": f"{file.stem} {i}"}) + "\n" for i in range(10)))
    train = [str(file) for file in files]
    records = load_records(DataSection(train=train[1]), train[1])
    assert seen_in_training(DataSection(train=train, weights=[1, 1], limit=5), records) == set(range(5))
    assert seen_in_training(DataSection(train=train, limit=5), records) == set()
    assert seen_in_training(DataSection(train=train, limit=12), records) == {0, 1}

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

"""What the first records say of a run: prompts that are too long, and what to do about them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qswitch.data.first_look import first_look
from qswitch.layers import build_config

SHORT = "what can be said in so few words as these, one or two"  # 18 tokens at 3 bytes each, and the template's 32
LONG = "so many words of no meaning " * 70  # 1,960 characters: 654 tokens, and the template's


@pytest.mark.parametrize(
    ("limit", "num_long", "context", "advised"),
    [
        (256, 3, None, None),  # of 300 prompts: more than 95 % are kept already
        (64, 3, None, None),
        (32, 3, None, 64),
        (256, 30, None, 704),
        (256, 30, 960, 704),
        (256, 30, 959, None),  # which rollout.max_new_tokens=256 leaves no room for
        (256, 300, None, 704),
    ],
)
def test_a_limit_is_advised_only_where_it_keeps_more(tmp_path: Path, limit, num_long, context, advised):
    lines = [json.dumps({"prompt": LONG if i < num_long else f"{SHORT} {i}"}) for i in range(300)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    config = build_config(
        {"teacher": {"model": "t"}, "student": {"model": "s"}, "rollout": {"max_new_tokens": 256},
         "data": {"train": str(tmp_path / "p.jsonl"), "max_prompt_tokens": limit, "num_validation": 2}}
    )  # fmt: skip
    look = first_look(config, context)
    assert look is not None and look.num_too_long == num_long
    said = look.render()
    assert f"{num_long} of the 300 prompts are longer than data.max_prompt_tokens={limit}" in said
    if advised is None:
        longest = re.search(r"The longest has about (\d+) tokens\.$", said)
        assert longest is not None and 686 <= int(longest[1]) <= 690 and "--set" not in said
    else:
        assert said.endswith(f"For nearly all of them: --set data.max_prompt_tokens={advised}.")

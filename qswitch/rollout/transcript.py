"""A rollout as text that shows who wrote which token. Knows no model; the tokenizer only turns ids into text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qswitch.rollout.decode import Rollout
from qswitch.rollout.policy import WRITER_NAMES


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """One response token with its writer; divergence and threshold in bits, None where not measured."""

    text: str
    writer: str
    jsd: float | None
    tau: float | None
    student: str | None = None
    """What the student would have written here; None where it was not asked."""
    teacher: str | None = None
    """What the teacher would have written here; None where it was not asked, or does not write alone."""


def written_tokens(rollout: Rollout, tokenizer: Any) -> list[WrittenToken]:
    """The response token by token; the texts joined are the response."""
    texts, befores, decoded = [], [], ""
    for end in range(1, len(rollout.response_ids) + 1):
        # Decode the prefix, not the token: one character may take several tokens.
        prefix = tokenizer.decode(rollout.response_ids[:end], skip_special_tokens=False)
        stable = prefix.rstrip("\ufffd") if end < len(rollout.response_ids) else prefix
        texts.append(stable[len(decoded) :])
        befores.append(decoded)
        decoded = stable if len(stable) > len(decoded) else decoded

    def candidate(t: int, ids: list[int | None] | None) -> str | None:
        token = ids[t] if ids is not None else None
        if token is None or token == rollout.response_ids[t]:
            return None if token is None else texts[t]
        read = tokenizer.decode([*rollout.response_ids[:t], token], skip_special_tokens=False)
        return read[len(befores[t]) :]

    return [
        WrittenToken(
            text=text,
            writer=WRITER_NAMES[rollout.writers[t]],
            jsd=rollout.jsd_bits[t] if rollout.jsd_bits else None,
            tau=rollout.thresholds[t] if rollout.thresholds else None,
            student=candidate(t, rollout.student_ids),
            teacher=candidate(t, rollout.teacher_ids),
        )
        for t, text in enumerate(texts)
    ]


def rollout_record(rollout: Rollout, tokenizer: Any, *, step: int) -> dict[str, Any]:
    """One line of RUN/rollouts.jsonl."""
    return {
        "step": step,
        "example_id": rollout.example_id,
        "visit": rollout.visit,
        "prompt": tokenizer.decode(rollout.prompt_ids, skip_special_tokens=False),
        "response": tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
        "response_ids": rollout.response_ids,
        "ended": rollout.ended,
        "tokens": [asdict(token) for token in written_tokens(rollout, tokenizer)],
    }

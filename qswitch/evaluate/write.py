"""Let one model write its responses to a test set, chunk by chunk, into the evaluation's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from qswitch.data.template import Prompt
from qswitch.distill.recovery import BatchRows
from qswitch.evaluate.protocol import Protocol
from qswitch.evaluate.rouge import rouge_l
from qswitch.evaluate.store import Lines
from qswitch.evaluate.subjects import LoadedSubject
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import Policy, StudentPolicy, TeacherPolicy

YARDSTICK_SEED = 20_250_429
"""Seed of the responses on which distances are measured, the teacher's and every model's own."""
CHUNK_ROWS = 8
"""Responses written between two saves, in batches."""


def write_responses(
    loaded: LoadedSubject,
    missing: Sequence[tuple[Prompt, int]],
    store: Lines,
    rows: BatchRows,
    protocol: Protocol,
    what: str,
    *,
    role: Literal["answers", "own", "teacher"] = "answers",
    references: Mapping[int, Sequence[str]] | None = None,
    say: Callable[[str], None],
) -> None:
    """Write responses chunk by chunk, so that an interruption loses one chunk at most.

    Args:
        missing: prompts with the seed of each.
        role: `answers` to a set, as the protocol says and scored against `references`; or responses at temperature 1
            with their token ids, for measuring distances on them: a model's `own`, or the `teacher`'s.
    """
    size = CHUNK_ROWS * rows.rows
    teacher, answers = role == "teacher", role == "answers"
    policy: Policy = TeacherPolicy() if teacher else StudentPolicy()
    for seed in dict.fromkeys(seed for _, seed in missing):
        # Long prompts first: a set that does not fit the memory says so at once.
        prompts = sorted((p for p, s in missing if s == seed), key=lambda p: (-len(p.prompt_ids), p.example_id))
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            write = partial(
                rollout,
                [RolloutRequest(p.example_id, 0, p.prompt_ids, protocol.max_new_tokens) for p in chunk],
                teacher=loaded.model if teacher else None,
                student=None if teacher else loaded.model,
                policy=policy,
                seed=seed,
                temperature=protocol.temperature if answers else 1.0,
                eos_ids=loaded.eos_ids,
                pad_id=loaded.pad_id,
                keep="nothing",
                no_repeat_ngram_size=protocol.no_repeat_ngram_size if answers else 0,
            )
            written, stats = rows.attempt(loaded.model.device, write)
            lines = []
            for r in written:
                text = loaded.tokenizer.decode(r.response_ids, skip_special_tokens=True).strip()
                row = {"id": r.example_id, "seed": seed, "response": text, "tokens": len(r.response_ids),
                       "ended": r.ended}  # fmt: skip
                if not answers:
                    row["response_ids"] = r.response_ids
                elif references is not None and references[r.example_id]:
                    row["rouge_l"] = rouge_l(text, references[r.example_id])
                lines.append(row)
            store.add(lines)
            speed = stats.tokens / stats.seconds if stats.seconds else 0.0
            say(f"{what}: {start + len(chunk)}/{len(prompts)} responses, seed {seed}, {speed:.0f} tokens/s")

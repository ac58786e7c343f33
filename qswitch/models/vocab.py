"""Whether two tokenizers map the same text to the same ids, and how many ids both heads can produce.

Sizes prove nothing: two vocabularies of 32,000 entries may be strangers, and one tokenizer may stand before heads of
151,936 and 152,064 rows (padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qswitch.errors import ModelError, TokenizerMismatchError
from qswitch.models.messages import say_once
from qswitch.plan.vocabulary import renamed_ids
from qswitch.rules import OTHER_TOKENIZER_REMEDY

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 1,234.56 or 0x1F; 3e-8, 2026-01-31, 10%.",
    "  leading and trailing  \n\n\ttabs\r\nand newlines \n",
    "def f(x: int) -> int:\n    return x ** 2  # done\n",
    '{"key": [1, null, true], "path": "C:\\\\tmp"}',
    "Größe, naïve, façade, Ελληνικά, Русский, עברית, العربية",
    "中文字符，日本語テキスト、한국어 문장",
    "e\u0301 vs \u00e9, ﬁ, \u200b zero width, \u00a0 no-break",
    "🙂👩‍👩‍👧 🇨🇭 ∑∫√ ≤ ≠",
    "<|im_start|>user\nHi<|im_end|>\n<s>[INST] x [/INST]</s><|endoftext|><unk>",
    "CamelCase snake_case kebab-case UPPER antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaa        !!!!!!!!",
)
"""Text in which tokenizers with equal vocabularies but other merges, normalisers or special tokens differ."""

NUM_SHOWN = 3


def check_tokenizers(teacher_tokenizer: Any, student_tokenizer: Any, *, teacher_rows: int, student_rows: int) -> int:
    """Return V, the number of ids that both models can produce, after proving that ids mean the same to both.

    `*_rows` are the rows of each model's head; V is the smaller. A head with fewer rows than the tokenizer has ids is
    refused, one with more is padded and gets sliced.

    Raises:
        TokenizerMismatchError: token -> id maps or probe encodings differ (shows the first).
        ModelError: a head has fewer rows than the tokenizer has ids.
    """
    different = difference(teacher_tokenizer, student_tokenizer)
    if different is not None:
        raise TokenizerMismatchError(f"{different.what} {different.remedy}")
    for role, rows in (("teacher", teacher_rows), ("student", student_rows)):
        check_head(role, teacher_tokenizer.get_vocab(), rows)
    return min(teacher_rows, student_rows)


@dataclass(frozen=True, slots=True)
class Difference:
    """Why ids do not mean the same to two tokenizers, and what somebody does who wants to distil."""

    what: str
    remedy: str


def difference(teacher_tokenizer: Any, student_tokenizer: Any) -> Difference | None:
    """The first thing in which the two read text differently; None where ids mean the same to both. Loads no weights.

    Says once where only names of special tokens held in reserve differ.
    """
    renamed = ids_with_other_names(teacher_tokenizer, student_tokenizer)
    if renamed is None:
        return _of_maps(teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab())
    if renamed:
        names = [tokenizer.convert_ids_to_tokens(renamed[0]) for tokenizer in (teacher_tokenizer, student_tokenizer)]
        say_once(
            f"{len(renamed)} special tokens have other names in the student's tokenizer, where one of the two models "
            f"holds them in reserve (id {renamed[0]} is {names[0]} and {names[1]}); all others are the same"
        )
    for special in (False, True):
        for probe in PROBES:
            a = teacher_tokenizer.encode(probe, add_special_tokens=special)
            b = student_tokenizer.encode(probe, add_special_tokens=special)
            if a != b:
                return _of_encodings(probe, a, b, teacher_tokenizer, special)
    return None


def ids_with_other_names(first: Any, second: Any) -> list[int] | None:
    """As `renamed_ids`, of two tokenizers."""
    mine, other = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (first, second))
    special = [{i for i, token in t.added_tokens_decoder.items() if token.special} for t in (first, second)]
    return renamed_ids(mine, other, special[0] & special[1])


def check_head(role: str, vocabulary: dict[str, int], rows: int) -> None:
    """Nothing, or an error where a head cannot produce every id of its tokenizer.

    Raises:
        ModelError: it has too few rows.
    """
    needed = max(vocabulary.values()) + 1
    if rows < needed:
        raise ModelError(
            f"The {role}'s head has {rows:,} rows, but the tokenizer has ids up to {needed - 1:,}. "
            "Use the tokenizer that belongs to the model, or a model with a head that covers it."
        )


def _of_maps(teacher: dict[str, int], student: dict[str, int]) -> Difference:
    by_id = sorted(
        set(teacher) | set(student), key=lambda t: (min(teacher.get(t, 1 << 60), student.get(t, 1 << 60)), t)
    )
    different = [t for t in by_id if teacher.get(t) != student.get(t)]
    shown = ", ".join(
        f"{token!r} (teacher id {teacher.get(token, 'none')}, student id {student.get(token, 'none')})"
        for token in different[:NUM_SHOWN]
    )
    return Difference(
        f"Teacher and student have different vocabularies ({len(teacher):,} and {len(student):,} tokens, "
        f"{len(different):,} of them with different ids). First: {shown}.",
        "SWITCH and most methods mix tokens of both models, which must share one tokenizer then. "
        f"{OTHER_TOKENIZER_REMEDY}",
    )


def _of_encodings(probe: str, a: list[int], b: list[int], tokenizer: Any, special: bool) -> Difference:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    left, right = (tokenizer.convert_ids_to_tokens(ids[at : at + NUM_SHOWN]) for ids in (a, b))
    with_special = " with special tokens" if special else ""
    return Difference(
        f"Teacher and student have one vocabulary but encode text differently{with_special}: {probe[:40]!r} from token "
        f"{at} on is {left} for the teacher and {right} for the student.",
        "Use the same tokenizer files (merges, normaliser, BOS settings) for both, or method=seqkd.",
    )

"""What teacher and student share: one tokenizer, one vocabulary, the tokens that end a response.

Or do not share: then each has its own, and a run is two halves (`teacher_half`, `student_half`) of one tokenizer each,
between which responses pass as text.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qswitch import rules
from qswitch.config import RunConfig, StudentSection, TeacherSection, as_text, reader
from qswitch.errors import ModelError, TokenizerMismatchError
from qswitch.models.load import load_tokenizer, read_config
from qswitch.models.references import model_file, resolve_reference
from qswitch.models.vocab import check_head, check_tokenizers


@dataclass(frozen=True, slots=True)
class TokenizerPair:
    """The checked tokenizers of a pair."""

    tokenizer: Any
    """The tokenizer whose ids both models read: the teacher's."""
    teacher: Any
    student: Any
    vocab_size: int
    """Size V of the vocabulary both heads can produce; rows beyond it are padding."""
    eos_ids: tuple[int, ...]
    """Tokens that end a response, of either model."""
    pad_id: int
    teacher_eos_ids: tuple[int, ...] = ()
    """Tokens that end a response of the teacher, by its tokenizer and generation config."""
    student_eos_ids: tuple[int, ...] = ()

    @property
    def eos_token_id(self) -> int | list[int]:
        """`eos_ids` as a generation config has them."""
        return self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)


def with_own_tokenizer(config: RunConfig) -> RunConfig:
    """The configuration with student.tokenizer=auto turned into `own`, where the tokenizers differ and the method
    allows it; else as it is, and `load_pair_tokenizer` says what is wrong.

    Raises:
        ConfigError: it has settings that nothing reads then.
    """
    if config.student.tokenizer != "auto" or not rules.may_pass_text(reader(config)):
        return config
    try:
        load_pair_tokenizer(config)
    except TokenizerMismatchError:
        return as_text(config)
    except ModelError:
        pass  # a model that is not there is for the list of the preflight
    return config


def teacher_half(config: RunConfig) -> RunConfig:
    """Of a run that passes text, what the teacher does: the same with the teacher in the student's place."""
    teacher = config.teacher
    student = StudentSection(
        model=teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code,
        shape=teacher.shape, tokenizer="shared",
    )  # fmt: skip
    own = {"template": "teacher"} if config.data.template == "student" else {}
    data = config.data.model_copy(update={"lm_corpus": None, **own})
    return config.model_copy(update={"student": student, "data": data})


def student_half(config: RunConfig, training: Sequence[Path], held_out: Sequence[Path]) -> RunConfig:
    """Of a run that passes text, what the student does: it learns the responses in files that the teacher has written.

    Their records are ours, so nothing that says how to read the user's is left.
    """
    files = {"train": [*map(str, training)], "validation": [*map(str, held_out)]}
    said: dict[str, Any] = {"weights": None, "limit": None, "columns": {}, "split": "train", "validation_split": None,
            "system_prompt": None, "ground_truth_mix": 1.0}  # fmt: skip
    return config.model_copy(update={"data": config.data.model_copy(update={**files, **said})})


def load_pair_tokenizer(config: RunConfig) -> TokenizerPair:
    """Load both tokenizers and check that they map the same text to the same ids; or the student's alone, where it has
    its own.

    Raises:
        TokenizerMismatchError: they do not.
        ModelError: a tokenizer cannot be loaded, none of the two knows an end-of-sequence token, or data.end_tokens
            names a token that they do not have.
    """
    if config.passes_text:
        return _student_alone(config)
    teacher, student = load_tokenizer(config.teacher), load_tokenizer(config.student)
    vocab_size = check_tokenizers(
        teacher, student, teacher_rows=_num_rows(config.teacher), student_rows=_num_rows(config.student)
    )
    own, named = [], _ids_of_tokens(teacher, config.data.end_tokens)
    for tokenizer, section in ((teacher, config.teacher), (student, config.student)):
        eos = _generation_eos(section) | ({tokenizer.eos_token_id} - {None}) | named
        own.append(tuple(sorted(i for i in eos if i < vocab_size)))
    eos_ids = tuple(sorted({*own[0], *own[1]}))
    if not eos_ids:
        raise ModelError(
            "Neither tokenizer has an end-of-sequence token, so responses would always run to rollout.max_new_tokens. "
            "Set eos_token in the teacher's tokenizer_config.json."
        )
    return TokenizerPair(teacher, teacher, student, vocab_size, eos_ids, teacher.pad_token_id, own[0], own[1])


def _student_alone(config: RunConfig) -> TokenizerPair:
    """The student in both places. data.end_tokens are the teacher's; those that the student has, end its own too."""
    tokenizer, rows = load_tokenizer(config.student), _num_rows(config.student)
    check_head("student", tokenizer.get_vocab(), rows)
    known = tokenizer.get_vocab()
    named = {known[token] for token in config.data.end_tokens if token in known}
    found = (_generation_eos(config.student) | {tokenizer.eos_token_id} | named) - {None}
    eos_ids = tuple(sorted(i for i in found if i < rows))
    if not eos_ids:
        raise ModelError(
            "The student's tokenizer has no end-of-sequence token, so its responses would always run to "
            "rollout.max_new_tokens. Set eos_token in its tokenizer_config.json."
        )
    return TokenizerPair(tokenizer, tokenizer, tokenizer, rows, eos_ids, tokenizer.pad_token_id, eos_ids, eos_ids)


def _ids_of_tokens(tokenizer: Any, tokens: Sequence[str]) -> set[int]:
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            special = [str(t) for t in tokenizer.added_tokens_decoder.values()]
            near = difflib.get_close_matches(token, special, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else f"Its special tokens are {', '.join(special[:12])}."
            raise ModelError(f"data.end_tokens names {token}, which the tokenizer does not have. {hint}")
    return {known[token] for token in tokens}


def template_tokenizer(pair: TokenizerPair, template: str) -> Any:
    """The tokenizer whose chat template data.template names; ids are the same with either."""
    return pair.student if template == "student" else pair.tokenizer


def _num_rows(section: TeacherSection | StudentSection) -> int:
    resolved = resolve_reference(section.model, section.revision)
    return int(read_config(resolved, section.trust_remote_code).get_text_config().vocab_size)


def _generation_eos(section: TeacherSection | StudentSection) -> set[int]:
    resolved = resolve_reference(section.model, section.revision)
    without = "without it the tokenizer's end-of-sequence token alone ends a response"
    path = model_file(resolved, "generation_config.json", without)
    if path is None:  # common, and the tokenizer's token stands
        return set()
    try:
        eos = GenerationConfig.from_pretrained(path.parent).eos_token_id
    except OSError as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Mend it, or delete it.") from None
    found = eos if isinstance(eos, list) else [eos]
    if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in found):
        raise ModelError(
            f"generation_config.json of {resolved.name}: eos_token_id is {eos!r}, not a token id or a list."
        )
    return {i for i in found if i is not None}

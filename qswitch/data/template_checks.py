"""Whether both models of a pair read a conversation alike, and end where it ends. Knows tokenizers, no weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qswitch.config import RunConfig
from qswitch.data.records import Record
from qswitch.data.template import PromptEncoder
from qswitch.data.turns import Message
from qswitch.models.pair import TokenizerPair
from qswitch.thinking import THINKING, THINKING_TOKENS, THOUGHT_END, opened_thought

logger = logging.getLogger(__name__)

PROBE = Record(0, (Message("user", "What is 2 + 2? It's four."),), None, "the template probe")
MIN_MARKER_CHARACTERS = 5
"""Shorter special tokens, such as <s>, may be markup that a prompt is about."""


def end_token_problems(config: RunConfig, pair: TokenizerPair) -> list[str]:
    """Why a response that the teacher has ended would not end for the student."""
    own = {"teacher": pair.teacher_eos_ids, "student": pair.student_eos_ids}
    if config.data.allow_eos_mismatch or not all(own.values()) or set(own["teacher"]) & set(own["student"]):
        return []
    names = {role: ", ".join(map(str, pair.tokenizer.convert_ids_to_tokens(list(ids)))) for role, ids in own.items()}
    return [
        f"The teacher ends a response with {names['teacher']}, the student with {names['student']}: in other programs "
        "the exported student would run on to its limit. Use the student that belongs to this teacher (its chat "
        "variant), give the student's generation_config.json the teacher's eos_token_id, or set "
        "data.allow_eos_mismatch=true."
    ]


def warn_of_end_of_turn(pair: TokenizerPair, encoder: PromptEncoder) -> None:
    """Says where the template closes an answer with a token at which nothing stops."""
    closing = encoder.closing_token_id()
    if closing is None or closing in pair.eos_ids:
        return
    token, *ends = pair.tokenizer.convert_ids_to_tokens([closing, *pair.eos_ids])
    logger.warning(
        "The chat template closes an answer with %s, which ends no response: the models stop at %s. Rollouts and the "
        "exported student would run on to their limit. Set data.end_tokens='[\"%s\"]' to stop there.",
        token, ", ".join(ends), token,
    )  # fmt: skip


def warn_of_applied_template(config: RunConfig, pair: TokenizerPair, records: Sequence[Record]) -> None:
    """Says where prompts hold special tokens: a template was applied already, and a second one comes around it."""
    if config.data.template == "plain":  # then the data's own template is the only one
        return
    tokens = [token for token in pair.tokenizer.all_special_tokens if len(token) >= MIN_MARKER_CHARACTERS]
    for record in records:
        found = [token for token in tokens if any(token in turn.content for turn in record.messages)]
        if found:
            logger.warning(
                "%s: the prompt holds %s, as text with a chat template around it does; data.template puts a second "
                "one around it. Give the conversation as messages, or set data.template=plain.",
                record.source, found[0],
            )  # fmt: skip
            return


def warn_of_thinking(config: RunConfig, encoder: PromptEncoder, records: Sequence[Record]) -> None:
    """Says where the models think before they answer, nobody has said whether they should, and few tokens are left; and
    where answers that hold no thought would be learnt as one."""
    always = bool(opened_thought(encoder.render(PROBE)))
    if always and config.reads_responses:
        _warn_of_answers_in_thoughts(encoder, records)
    limit, has_choice = config.rollout.max_new_tokens, encoder.reads(THINKING)
    if not config.writes_rollouts or limit >= THINKING_TOKENS or not (always or has_choice):
        return
    said = THINKING in encoder.template_kwargs or any(THINKING in record.template_kwargs for record in records)
    if said or (config.reads_responses and any(record.shows_thinking for record in records)):
        return
    if has_choice:
        logger.warning(
            "The chat template lets the models think before they answer, and rollout.max_new_tokens=%d may end before "
            "an answer begins. Set data.template_kwargs.%s=false for answers alone, or rollout.max_new_tokens=%d to "
            "distil the thinking as well; %s=true says that it is meant.",
            limit, THINKING, THINKING_TOKENS, THINKING,
        )  # fmt: skip
    else:
        logger.warning(
            "The chat template makes the models think before they answer, and rollout.max_new_tokens=%d may end before "
            "an answer begins. Set rollout.max_new_tokens=%d, or take models that answer at once.",
            limit, THINKING_TOKENS,
        )  # fmt: skip


def _warn_of_answers_in_thoughts(encoder: PromptEncoder, records: Sequence[Record]) -> None:
    """Names the first record whose answer never ends the thought that its prompt opens."""
    for record in records:
        if not record.has_response or record.teacher_response is not None:
            continue
        prompt = encoder.encode(record)
        response = encoder.tokenizer.decode(prompt.response_ids)
        if opened_thought(prompt.text) and THOUGHT_END not in response:
            logger.warning(
                "%s: the chat template opens a thought before every answer, and this answer ends none, so the student "
                "would learn to answer inside of its thought. Begin the answers with <think>...</think>, let the "
                "models write them (method: switch or seqkd), or take models that answer at once.",
                record.source,
            )
            return


def template_problems(config: RunConfig, pair: TokenizerPair, encoder: PromptEncoder) -> list[str]:
    """The template's own text, special tokens included, must be the same ids to both."""
    text = encoder.render(PROBE)
    ids = {role: t(text, add_special_tokens=False)["input_ids"] for role, t in
           (("teacher", pair.teacher), ("student", pair.student))}  # fmt: skip
    if ids["teacher"] == ids["student"]:
        return []
    pairs = zip(ids["teacher"], ids["student"], strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, ids.values())))
    shown = {role: getattr(pair, role).convert_ids_to_tokens(found[at : at + 3]) for role, found in ids.items()}
    return [
        f"data.template={config.data.template}: from token {at} of a rendered prompt on, the teacher's tokenizer reads "
        f"{shown['teacher']} and the student's {shown['student']}. Use the same tokenizer files for both, or "
        "data.template=alpaca."
    ]

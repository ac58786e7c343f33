"""What student and teacher answer to a few held-out prompts before and after training, for people: RUN/held_out.json.

The first held-out prompts are taken, none chosen. Both answer greedily, as most users will ask the student: at the
temperature of training a small model's answer to one prompt says more about the draw than about the model. Beside the
answers stand the validation's figures of every held-out prompt, from which the report computes intervals. Knows no
command line and no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qswitch.data.gather import DRAW
from qswitch.data.records import Message, Record
from qswitch.data.template import Prompt, PromptEncoder
from qswitch.outside import read_json
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import Policy, StudentPolicy, TeacherPolicy
from qswitch.run_dir import RunDir
from qswitch.state_files import HeldOutFile

if TYPE_CHECKING:
    from qswitch.distill.trainer import Trainer

NUM_ANSWERS = 6
"""Prompts that are answered: one short batch of the student before training and one after, and one of the teacher."""
_PLACE = "\ue000"
"""Stands for the user's words, to find out what the template puts around them; no text holds it."""
_OTHERS = (
    "The run held out other prompts than its settings give now: an earlier version drew them by the run's seed, or the "
    "data has changed since. So its student may have been trained on some of these."
)


def keep_first_answers(trainer: Trainer, prompts: Sequence[Prompt], encoder: PromptEncoder) -> None:
    """Write RUN/held_out.json with the prompts, the untrained student's answers, and the teacher's or the data's."""
    sequences = trainer.validation.sequences
    if trainer.teacher is None:
        references = [_answer(sequence.response_ids, trainer) for sequence in sequences[:NUM_ANSWERS]]
    else:
        trainer.supply.teacher_comes()
        references = _answers(trainer, TeacherPolicy())
        trainer.supply.teacher_leaves()
    texts = {p.example_id: p.text for p in prompts}
    answers = [
        {
            "prompt": _without_template(texts[sequence.example_id], encoder, trainer.config.data.system_prompt),
            "before": before,
            "after": None,
            "reference": reference,
        }
        for sequence, before, reference in zip(
            sequences[:NUM_ANSWERS], _answers(trainer, StudentPolicy()), references, strict=True
        )
    ]
    kept = {
        "figure": trainer.validation.key,
        "tokens": [len(sequence.loss_steps) for sequence in sequences],
        "reference": "teacher" if trainer.config.learns_from_teacher or trainer.config.passes_text else "data",
        "answers": answers,
    }
    trainer.run_dir.write_json(trainer.run_dir.held_out_path.name, kept)


def keep_last_answers(trainer: Trainer) -> None:
    """Add the answers of the student as it is now, and the figures of every prompt before and after.

    A run that was begun by an older version has no file to add to, and gets none: its untrained student is gone.
    """
    path = trainer.run_dir.held_out_path
    if not path.is_file():
        return
    kept: dict[str, Any] = dict(read_json(path, HeldOutFile))
    for answer, after in zip(kept["answers"], _answers(trainer, StudentPolicy()), strict=True):
        answer["after"] = after
    kept["before_nats"] = trainer.counters.before_nats_by_prompt
    kept["after_nats"] = trainer.counters.best_nats_by_prompt
    trainer.run_dir.write_json(path.name, kept)


def doubt_of_held_out(run_dir: RunDir, prompts: Sequence[Prompt], encoder: PromptEncoder) -> str | None:
    """Why a run may have been trained on the held-out prompts that its settings give now; None where nothing says so.

    Earlier versions drew them by the seed of the run, and data that has changed since has others. Those that the run
    answered are in RUN/held_out.json; where it is missing only the seed tells.
    """
    config, path = run_dir.config, run_dir.held_out_path
    if config.data.validation is not None:
        return None
    are_same = config.seed == DRAW
    if path.is_file():
        now = {_without_template(p.text, encoder, config.data.system_prompt) for p in prompts}
        are_same = all(answer["prompt"] in now for answer in read_json(path, HeldOutFile)["answers"])
    return None if are_same else _OTHERS


def _answers(trainer: Trainer, policy: Policy) -> list[dict[str, Any]]:
    """The greedy answers of one model to the first held-out prompts."""
    config, pair = trainer.config, trainer.pair
    requests = [
        RolloutRequest(sequence.example_id, 0, sequence.prompt_ids, config.rollout.max_new_tokens)
        for sequence in trainer.validation.sequences[:NUM_ANSWERS]
    ]

    def write() -> list[dict[str, Any]]:
        written, _ = rollout(
            requests,
            teacher=trainer.teacher if policy.uses_teacher else None,
            student=trainer.student if policy.uses_student else None,
            policy=policy,
            seed=0,
            temperature=0.0,
            eos_ids=pair.eos_ids,
            pad_id=pair.pad_id,
            batch_size=trainer.recovery.sizes.rollout_rows,
            keep="nothing",
        )
        return [_answer(one.response_ids, trainer) for one in written]

    return trainer.recovery.attempt("rollout", write)


def _answer(response_ids: Sequence[int], trainer: Trainer) -> dict[str, Any]:
    pair = trainer.pair
    text = pair.tokenizer.decode(response_ids, skip_special_tokens=True)
    return {"text": text, "ended": bool(response_ids) and response_ids[-1] in pair.eos_ids}


def _without_template(text: str, encoder: PromptEncoder, system_prompt: str | None) -> str:
    """The words of the user; the whole prompt where the template around them is another one."""
    system = (Message("system", system_prompt),) if system_prompt else ()
    empty = encoder.render(Record(id=0, messages=(*system, Message("user", _PLACE)), response=None, source="template"))
    start, _, end = empty.partition(_PLACE)
    inside = text.removeprefix(start).removesuffix(end)
    return inside.strip() if len(inside) == len(text) - len(start) - len(end) else text

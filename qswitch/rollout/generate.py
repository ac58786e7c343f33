"""One response from a finished or running run, for a person to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qswitch.data.records import Message, Record
from qswitch.data.template import PromptEncoder
from qswitch.errors import RunDirError
from qswitch.models.load import load_teacher
from qswitch.models.pair import load_pair_tokenizer, template_tokenizer
from qswitch.models.runtime import make_runtime
from qswitch.models.student import load_adapter, load_student
from qswitch.rollout.decode import RolloutRequest, rollout
from qswitch.rollout.policy import StudentPolicy, make_policy
from qswitch.rollout.transcript import WrittenToken, written_tokens
from qswitch.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Generation:
    """A response and its tokens with their writers."""

    text: str
    tokens: list[WrittenToken]


def generate_from_run(
    run_path: Path, prompt: str, *, max_new_tokens: int | None = None, seed: int = 0, show_writers: bool = False
) -> Generation:
    """Let the student of a run answer; with show_writers the run's policy writes, teacher included.

    Raises:
        RunDirError: the run has neither a final adapter nor a checkpoint.
    """
    run_dir = RunDir.open(run_path)
    config = run_dir.config
    adapter = run_dir.adapter_path
    if not adapter.exists():
        latest = run_dir.latest_checkpoint()
        if latest is None:
            raise RunDirError(f"{run_path} holds no adapter yet. Wait for its first checkpoint, or resume the run.")
        adapter = latest / "adapter"
    runtime = make_runtime(config.train)
    pair = load_pair_tokenizer(config)
    student = load_student(config, runtime, vocab_size=pair.vocab_size, base_path=run_dir.student_base_path)
    load_adapter(student, adapter)
    teacher = load_teacher(config.teacher, runtime, vocab_size=pair.vocab_size) if show_writers else None
    encoder = PromptEncoder(
        template_tokenizer(pair, config.data.template), config.data.template, end_token_ids=pair.eos_ids
    )
    turns = (Message("system", config.data.system_prompt),) if config.data.system_prompt else ()
    record = Record(id=0, messages=(*turns, Message("user", prompt)), response=None, source="command line")
    encoded = encoder.encode(record)
    request = RolloutRequest(0, 0, encoded.prompt_ids, max_new_tokens or config.rollout.max_new_tokens)
    written, _ = rollout(
        [request],
        teacher=teacher,
        student=student,
        policy=make_policy(config.rollout) if show_writers else StudentPolicy(),
        seed=seed,
        temperature=config.rollout.temperature,
        eos_ids=pair.eos_ids,
        pad_id=pair.pad_id,
        batch_size=1,
        keep="nothing",
    )
    tokens = written_tokens(written[0], pair.tokenizer)
    return Generation(text=pair.tokenizer.decode(written[0].response_ids, skip_special_tokens=True), tokens=tokens)

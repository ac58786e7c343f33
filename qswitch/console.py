"""What finished commands say to people on a terminal. Knows results, never how they came about. Cold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qswitch.plan.render import duration
from qswitch.run_dir import RunDir
from qswitch.terminal import printable
from qswitch.units import GIB, bits_per_byte

if TYPE_CHECKING:
    from qswitch.distill.session import Summary
    from qswitch.export.gguf import GgufParity
    from qswitch.export.merge_report import MergeReport
    from qswitch.export.push import Push
    from qswitch.models.shrink import ShrinkReport
    from qswitch.rollout.generate import Generation

WRITER_STYLES = {"teacher": "black on bright_yellow", "student": "bright_cyan", "mixture": "bright_magenta"}


def print_summary(run_dir: RunDir, summary: Summary) -> None:
    """A finished run: its last rollout, its figures before and after, and what to do next."""
    rollouts = run_dir.read_rollouts()
    if rollouts:
        last = rollouts[-1]
        print(f"\nA rollout of step {last['step']}, coloured by writer:")
        print(coloured([(token["text"], token["writer"]) for token in last["tokens"]]))
    what = f"KL(teacher || student) on {summary.validation_prompts} held-out prompts, teacher-written responses"
    before, after, last_nats = summary.kl_before_nats, summary.kl_after_nats, summary.kl_last_nats
    if before is None or after is None:
        what = f"Loss on the responses of {summary.validation_prompts} held-out prompts"
        if run_dir.config.passes_text:
            what = f"Loss on what the teacher wrote to {summary.validation_prompts} held-out prompts, as text"
        before, after = summary.response_loss_before_nats, summary.response_loss_after_nats
        last_nats = summary.response_loss_last_nats
    assert before is not None and after is not None, "a finished run has validated"
    change = abs(1 - after / before) if before else 0.0
    direction = "higher" if after > before else "lower"
    print(
        f"\n{what} ({summary.validation_tokens} tokens):\n"
        f"  before {before:.3f}   after {after:.3f} nats/token ({change:.0%} {direction})\n"
        f"{_by_byte(run_dir, summary)}"
        f"  {summary.steps} steps, {summary.rollout_tokens} rollout tokens, {summary.trained_tokens} trained tokens, "
        f"{_time(summary)} of training\n"
        f"{_writers(run_dir, summary)}"
        f"  memory: {summary.peak_gib:.2f} GiB measured, {summary.planned_gib:.2f} GiB planned\n"
        f"  adapter: {run_dir.adapter_path}{_of_step(summary, last_nats)}\n"
        f"  report:  {run_dir.report_path}\n"
        f"  next:    qswitch chat {run_dir.path}\n"
        f"           qswitch merge {run_dir.path}"
    )


def _of_step(summary: Summary, last_nats: float | None) -> str:
    """Of which step the adapter is, where it is not the last one."""
    if summary.best_step == summary.steps or last_nats is None:
        return ""
    best, steps = summary.best_step, summary.steps
    return f"\n           of step {best}, the best validation; after step {steps} it was {last_nats:.3f}"


def _writers(run_dir: RunDir, summary: Summary) -> str:
    """How many batches the student wrote, where the run decides that itself."""
    if not run_dir.config.data.adaptive_share:
        return ""
    return f"  the student wrote {summary.rollout_batches} of {summary.steps} batches, the data the others\n"


def _by_byte(run_dir: RunDir, summary: Summary) -> str:
    """The figure in bits per byte, and why there is no KL; nothing where teacher and student read the same tokens."""
    if not run_dir.config.passes_text:
        return ""
    bits = [bits_per_byte(nats, summary.validation_tokens, summary.validation_bytes) for nats in
            (summary.response_loss_before_nats, summary.response_loss_after_nats)]  # fmt: skip
    shown = "" if bits[0] is None or bits[1] is None else f"  before {bits[0]:.3f}   after {bits[1]:.3f} bits/byte\n"
    return f"{shown}  no KL(teacher || student): their tokenizers differ\n"


def _time(summary: Summary) -> str:
    """How long training took, beside the plan where it knew."""
    if summary.planned_seconds is None:
        return duration(summary.seconds)
    return f"{duration(summary.seconds)} (by the plan's arithmetic {duration(summary.planned_seconds)})"


def coloured(tokens: list[tuple[str, str]]) -> str:
    """(text, writer) of each token, coloured by writer; without colours the teacher's stand in brackets."""
    console = Console(highlight=False)
    colours = console.is_terminal and not console.no_color
    text = Text()
    for piece, writer in ((printable(text), writer) for text, writer in tokens):
        marked = piece if colours or writer != "teacher" or not piece.strip() else f"[{piece}]"
        text.append(marked, style=WRITER_STYLES[writer])
    legend = Text("\n").append("student", style=WRITER_STYLES["student"]).append("  ")
    legend.append("teacher" if colours else "[teacher]", style=WRITER_STYLES["teacher"])
    with console.capture() as captured:
        console.print(text + legend, soft_wrap=True, end="")
    return captured.get()


def merged(report: MergeReport) -> str:
    """Where a merged model lies and how far it is from the adapter."""
    return (
        f"merged model: {report.output_dir}\n"
        f"against the adapter on {report.num_prompts} prompts: largest logit difference "
        f"{report.max_logit_difference:.2e} in fp32 (a pass rounds by {report.pass_rounding:.2e}), "
        f"{report.merge_error:.2e} in exact arithmetic; KL {report.kl_nats:.2e} nats (as saved)"
    )


def written_as_gguf(files: Sequence[GgufParity]) -> str:
    """Where the GGUF files lie, how far each is from the merged folder, and how Ollama takes them."""
    lines = []
    for file in files:
        size = f"{file.path} ({file.num_bytes / GIB:.2f} GiB)"
        if file.kl_nats is None or file.top1_agreement is None:
            lines.append(f"{size}: not compared with the merged folder. {file.note}")
            continue
        ids = {True: ", same token ids", False: ", OTHER TOKEN IDS", None: ""}[file.same_prompt_ids]
        lines.append(
            f"{size}: KL to the merged folder {file.kl_nats:.2e} nats, {file.top1_agreement:.1%} of the most likely "
            f"tokens the same{ids}, on {file.num_prompts} prompts (read by {file.read_by})"
        )
    return "\n".join([*lines, f"Ollama: ollama create NAME -f {files[0].path.parent / 'Modelfile'}"])


def _size(num_bytes: int) -> str:
    """Bytes in the unit in which they have at least one digit before the point."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


def pushed(push: Push) -> str:
    """The files that are on the hub, or would go there."""
    sizes = [_size(size) for size in push.files.values()]
    lines = [f"{size:>10}  {name}" for size, name in zip(sizes, push.files, strict=True)]
    total = f"{len(push.files)} files, {_size(sum(push.files.values()))},"
    access = "private" if push.private else "public"
    end = f"are in {push.url}" if push.url else f"would go to {push.repository}, {access} if it is new"
    return "\n".join([*lines, f"{total} {end}."])


def answers(generations: Sequence[Generation], *, coloured_by_writer: bool) -> str:
    """What a student answered; several with their prompts."""
    lines = []
    for one in generations:
        if len(generations) > 1:
            lines.append(f"> {printable(one.prompt)}")
        tokens = [(token.text, token.writer) for token in one.tokens]
        lines.append(coloured(tokens) if coloured_by_writer else printable(one.text))
    return "\n".join(lines)


def shrunk(report: ShrinkReport) -> str:
    """What a cut model has left."""
    return f"{report.output_dir}: {report.summary()}"

"""Models' own responses on their way to the teacher, who reads them to say how far it is from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from qswitch.distill.recovery import BatchRows
from qswitch.distill.teacher_distance import ModelView, own_distances
from qswitch.evaluate.store import Lines
from qswitch.evaluate.subjects import Subject
from qswitch.models.host_memory import release_memory


@dataclass(frozen=True, slots=True)
class OwnView:
    """What a model makes of its own responses to a set, until the teacher reads them."""

    what: str
    ids: list[int]
    view: ModelView
    pad_id: int
    store: Lines
    """Where the distances go."""


def held_bytes(waiting: Sequence[OwnView]) -> int:
    """Host memory that views hold; those of one model share its head."""
    tensors = [hidden for one in waiting for hidden in one.view.hidden]
    for head in {id(one.view.head): one.view.head for one in waiting}.values():
        tensors += head.linear.parameters()
    return sum(tensor.nbytes for tensor in tensors)


def read_by_teacher(
    teacher: Subject | None,
    device: str | None,
    waiting: Sequence[OwnView],
    rows: BatchRows,
    say: Callable[[str], None],
) -> None:
    """Let the teacher read what models have written, and store how far it is from it."""
    if not waiting:
        return
    assert teacher is not None
    say(f"loading the teacher {teacher.identity}, to read the models' own responses")
    loaded = teacher.load(device)
    for one in waiting:
        measure = partial(own_distances, one.view, loaded.model, pad_id=one.pad_id)
        found = rows.attempt(loaded.model.device, measure)
        one.store.add([{"id": i} | asdict(d) for i, d in zip(one.ids, found, strict=True)])
        say(f"{one.what}: the teacher read {len(found)} own responses")
    place = loaded.model.device
    del loaded
    release_memory(place)

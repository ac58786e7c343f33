"""Which presets there are, in a word each, for people who choose: `presets/index.json`. Cold, without pydantic.

To plan every preset takes longer than all else that a command does at its start, and depends on nothing but files of
the package. So `make presets` does it (`preset_info.py`), and a test holds that the index is current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PresetInfo:
    """A preset as `qswitch presets list` shows it."""

    name: str
    description: str
    vram: str | None
    """The card it is planned for; None: a CPU."""
    planned_gib: float
    """Peak of the plan for that card, GiB."""
    fits: bool
    gated: bool
    twin: str | None
    """For a gated preset: the one that needs no token."""
    paper: bool
    """Whether the hyper-parameters are the paper's."""
    licences: dict[str, str]
    command: str


def presets_folder() -> Path:
    """The folder of the YAML files: inside the installed package, or at the top of a source checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[1] / "presets"


def read_index() -> list[PresetInfo]:
    """Every preset, planned for its own card."""
    return [PresetInfo(**one) for one in json.loads((presets_folder() / "index.json").read_text(encoding="utf-8"))]


def render_index(infos: Iterable[PresetInfo]) -> str:
    """The text of `presets/index.json`."""
    return json.dumps([asdict(info) for info in infos], indent=1, ensure_ascii=False) + "\n"


def render_list(infos: list[PresetInfo]) -> str:
    """A line per preset: name, card, planned peak, purpose, access."""
    width = max(len(i.name) for i in infos)
    lines = [f"{'preset':<{width}}  {'card':>6}  {'peak GiB':>8}  purpose"]
    for info in infos:
        twin = f" Without one: {info.twin}." if info.twin else ""
        paper = " Paper." if info.paper else ""
        card = info.vram or "CPU"
        lines.append(f"{info.name:<{width}}  {card:>6}  {info.planned_gib:>8.1f}  {info.description}{twin}{paper}")
    lines += ["", "Peaks are planned, not measured. `qswitch presets show NAME` shows every setting."]
    return "\n".join(lines)

"""What the commands share: options, how a configuration is chosen, how a result is shown. Cold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qswitch.errors import ConfigError
from qswitch.launch import launched
from qswitch.methods import METHODS
from qswitch.outside import user_path
from qswitch.terminal import printable, printable_json, tell
from qswitch.units import MAX_TOKENS

if TYPE_CHECKING:
    from qswitch.config import RunConfig
    from qswitch.run import Rehearsal

Preset = Annotated[str | None, typer.Option("--preset", help="Name of a preset; `qswitch presets list` shows them.")]
Config = Annotated[Path | None, typer.Option("--config", parser=user_path, help="YAML file instead of a preset.")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="teacher.model: hub id, folder or GGUF file.")]
Student = Annotated[
    str | None, typer.Option("--student", help="student.model; or `shrink`, `shrink:N`: the teacher cut to N layers.")
]
Data = Annotated[list[str] | None, typer.Option("--data", help="data.train: file, folder or hub id. Repeatable.")]
Method = Annotated[str | None, typer.Option("--method", help=f"One of {', '.join(METHODS)}.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, for example train.max_steps=100. Repeatable.")
]
Vram = Annotated[str | None, typer.Option("--vram", help="Memory budget, for example 12GiB; default: what is free.")]
Device = Annotated[
    Literal["cuda", "cpu"] | None,
    typer.Option("--device", help="Default: as the run, else what there is."),
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, max=MAX_TOKENS, help="Response limit, tokens; default: the run's.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the settings and print the plan; load nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


@dataclass(frozen=True, slots=True)
class Named:
    """What the options of a command say a run is made of; nothing that is empty."""

    preset: str | None = None
    config: Path | None = None
    overrides: list[str] | None = None
    teacher: str | None = None
    student: str | None = None
    data: list[str] | None = None
    method: str | None = None

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    @property
    def label(self) -> str:
        """For the folder of a run."""
        file = self.config or (Path(self.preset) if self.preset and self.preset.endswith((".yaml", ".yml")) else None)
        return file.stem if file else self.preset or "run"


def load_settings(
    named: Named,
    *,
    vram: str | None = None,
    gpu: str | None = None,
    command: str = "distill",
    trains: Literal["teacher", "student"] | None = None,
) -> RunConfig:
    """The configuration that the options name: a preset or a file, changed; or a pair, for which the rest is chosen.

    With `trains` it fine-tunes that model of the pair (`sft_config`). What was chosen is said beside the result, with
    the command that repeats it.

    Raises:
        ConfigError: both a preset and a file are named, the pair or its data is incomplete, or what it says is wrong.
    """
    from qswitch.layers import set_layer, sft_config, with_teacher_as_student

    preset, config, data = named.preset, named.config, named.data
    if preset is not None and config is not None:
        raise ConfigError("Name either --preset NAME or --config FILE. `qswitch presets list` shows the presets.")
    options = {"teacher.model": named.teacher, "student.model": named.student, "method": named.method,
               "data.train": data[0] if data and len(data) == 1 else data}  # fmt: skip
    own = set_layer(named.overrides or [], {key: value for key, value in options.items() if value})
    source = config if preset is None else preset
    from qswitch.choose import choose, with_cut_student

    if source is None:
        if not own:
            raise ConfigError(
                "Name --preset NAME or --config FILE, or a pair and its data: --teacher MODEL --student MODEL --data "
                "FILE. `qswitch presets list` shows the presets."
            )
        chosen = choose(with_teacher_as_student(own) if trains == "teacher" else own, vram=vram, gpu=gpu)
        say(chosen.render(command))
        return chosen.config if trains is None else sft_config(chosen.config, "student")
    if config is not None and config.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {config}: expected a .yaml file. For a preset write --preset {config}.")

    from qswitch.layers import build_config, cuts_another_student
    from qswitch.presets import load_preset

    below = load_preset(source)
    above, cut = with_cut_student(own, below)
    if cut is not None:
        say(f"{cut.setting}={cut.value}: {cut.because}")
    settings = build_config(below, above, where=f"{source} with --set" if own else str(source))
    if trains != "teacher" and cuts_another_student(below, above):
        say(
            f"The student {settings.student.model} is cut to {settings.student.shrink_to_layers} layers, as {source} "
            "says of its own; --set student.shrink_to_layers=null keeps it whole."
        )
    return settings if trains is None else sft_config(settings, trains, own)


def show(result: Any, as_json: bool, render: Callable[[Any], object], *, coloured: bool = False) -> None:
    """A result as JSON for a program, or what `render` makes of it for people; `coloured`: with colours of its own."""
    if as_json:
        print(printable_json(json.dumps(result, default=_plain, ensure_ascii=False, indent=1)))
    else:
        text = str(render(result))
        print(text if coloured else printable(text))


def show_plan(rehearsal: Rehearsal, as_json: bool, *, shown: bool = True, is_whole_card: bool = False) -> None:
    """The plan, and what is known of the data; what does not fit ends with its error.

    `is_whole_card`: the budget is all that a card leaves free to programs.
    """
    from qswitch.plan.advice import beside_a_desktop, faster, require_fit
    from qswitch.plan.render import render

    plan, budget_origin, look = rehearsal
    if shown:
        for_a_program = plan.to_dict() if look is None else plan.to_dict() | {"data": look.to_dict()}
        show(for_a_program, as_json, lambda _: render(
            plan, faster(plan), budget_origin,
            data=None if look is None else look.render(),
            leaves_hardly_any=look is not None and look.leaves_hardly_any,
            desktop=beside_a_desktop(plan) if is_whole_card else None,
        ))  # fmt: skip
    require_fit(plan)


def _plain(part: Any) -> Any:
    """What json does not know: a dataclass as its fields, anything else as text."""
    from dataclasses import asdict, is_dataclass

    return asdict(part) if is_dataclass(part) and not isinstance(part, type) else str(part)


def say(text: str) -> None:
    """A line about progress, beside the result; of several processes the first one says it."""
    if not launched().rank:
        tell(text)

"""What the commands share: options, how a configuration is chosen, how a result is shown. Cold."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qswitch.errors import ConfigError

if TYPE_CHECKING:
    from qswitch.config import RunConfig

Preset = Annotated[str | None, typer.Option("--preset", help="Name of a preset; `qswitch presets list` shows them.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file instead of a preset.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, for example train.max_steps=100. Repeatable.")
]
Vram = Annotated[str | None, typer.Option("--vram", help="Memory budget, for example 12GiB; default: what is free.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the settings and print the plan; load nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


def load_settings(preset: str | None, config: Path | None, overrides: list[str] | None) -> RunConfig:
    """The configuration that the options name.

    Raises:
        ConfigError: not one of a preset and a file is named, or what it says is wrong.
    """
    from qswitch.presets import load_run_config

    source = config if preset is None else preset
    if source is None or (preset is not None and config is not None):
        raise ConfigError("Name either --preset NAME or --config FILE. `qswitch presets list` shows the presets.")
    if config is not None and config.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--config {config}: expected a .yaml file. For a preset write --preset {config}.")
    return load_run_config(source, overrides)


def show(result: Any, as_json: bool, render: Callable[[Any], object]) -> None:
    """A result as JSON for a program, or what `render` makes of it for people."""
    print(json.dumps(result, default=_plain, ensure_ascii=False, indent=1) if as_json else render(result))


def _plain(part: Any) -> Any:
    """What json does not know: a dataclass as its fields, anything else as text."""
    from dataclasses import asdict, is_dataclass

    return asdict(part) if is_dataclass(part) and not isinstance(part, type) else str(part)


def say(text: str) -> None:
    """A line about progress, beside the result."""
    print(text, file=sys.stderr, flush=True)

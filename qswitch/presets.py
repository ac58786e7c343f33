"""Which ready-made configurations there are, and how a file becomes a run's settings. Cold."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from qswitch.config import RunConfig
from qswitch.errors import ConfigError
from qswitch.layers import build_config, by_section, set_layer, stack
from qswitch.outside import instead_of
from qswitch.preset_index import presets_folder
from qswitch.yaml_file import read_yaml


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(p.stem for p in presets_folder().glob("*.yaml"))


def preset_path(name: str) -> Path:
    """File of a preset.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    path = presets_folder() / f"{name}.yaml"
    if path.is_file() and Path(name).name == name:
        return path
    near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"There is no preset {name!r}.{hint} `qswitch presets list` shows them all.")


def load_preset(name_or_path: str | Path) -> dict[str, Any]:
    """Settings of a preset, or of a YAML file, with `extends` resolved.

    `extends` names a preset, or a file relative to the one that says it; the extending file wins key by key, and
    `key: null` in it takes the extended file's value away.

    Raises:
        ConfigError: unknown preset, unreadable file, or files that extend each other in a circle.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = preset_path(str(name_or_path))
    elif not path.exists():
        raise ConfigError(
            f"{path} does not exist.{instead_of(path)} `qswitch presets copy NAME {path}` writes one; `qswitch presets "
            "list` has the names."
        )
    return _load(path, seen=())


def load_run_config(source: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked configuration of a preset or file, with `section.key=value` overrides.

    Raises:
        ConfigError: every problem found.
    """
    name = f"{source} with --set" if overrides else str(source)
    return build_config(load_preset(source), set_layer(overrides or []), where=name)


def _load(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        circle = " -> ".join(p.name for p in (*seen, resolved))
        raise ConfigError(f"{path}: files extend each other in a circle: {circle}.")
    values = by_section(read_yaml(path), str(path))
    parent = values.pop("extends", None)
    if parent is None:
        return stack({}, values)
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: name one preset or file.")
    parent_path = path.parent / parent if parent.endswith((".yaml", ".yml")) else preset_path(parent)
    return stack(_load(parent_path, (*seen, resolved)), values)

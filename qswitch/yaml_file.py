"""How a YAML file becomes plain values, and which line is to blame where it does not. Cold: not even pydantic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qswitch.errors import ConfigError


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: the text is no YAML; says where.
    """
    import yaml

    # libyaml reads a preset about ten times as fast; PyYAML's wheels have it, a build without a compiler does not.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}not valid YAML: {getattr(error, 'problem', error)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, no YAML, or no mapping; names the line.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise ConfigError(f"{path}, {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected settings (key: value), found {type(values).__name__}.")
    return values

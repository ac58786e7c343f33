"""What a trained PEFT adapter is made of, read from its adapter_config.json. Cold: no peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qswitch.config import LoraSection, StudentSection
from qswitch.errors import ConfigError, FileError
from qswitch.outside import read_json, user_path

ADAPTER_CONFIG = "adapter_config.json"


def find_adapter(reference: str, setting: str) -> Path:
    """The PEFT folder that `setting` names: the folder itself, or the one inside a run directory.

    Raises:
        ConfigError: there is none; says what is there instead.
    """
    folder = user_path(reference)
    for candidate in (folder, folder / "adapter"):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    if not folder.is_dir():
        raise ConfigError(f"{setting}={reference}: no such folder. Name a run directory or a PEFT adapter folder.")
    for candidate in (folder, folder / "adapter"):
        if (candidate / "model.safetensors").is_file():
            owner = setting.partition(".")[0]
            raise ConfigError(f"{setting}={reference} holds a whole model, no adapter. Name it in {owner}.model.")
    unfinished = (folder / "config.yaml").is_file()
    reason = "is a run that has not finished" if unfinished else f"holds no {ADAPTER_CONFIG}"
    remedy = f"Finish it with `qswitch distill --resume {folder}`" if unfinished else "Name a PEFT adapter folder"
    raise ConfigError(f"{setting}={reference} {reason}. {remedy}.")


def adapter_settings(folder: Path) -> LoraSection:
    """The LoRA settings that an adapter was trained with.

    Raises:
        ConfigError: adapter_config.json is no JSON, or describes no LoRA.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = read_json(path, dict[str, Any])
        if values.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"{path} describes a {values['peft_type']} adapter; only LoRA can be used here.")
        targets = values["target_modules"]
        layers = values.get("layers_to_transform")
        return LoraSection(
            r=values["r"],
            alpha=values["lora_alpha"],
            target_modules=targets if isinstance(targets, str) else sorted(targets),
            use_dora=values.get("use_dora", False),
            use_rslora=values.get("use_rslora", False),
            modules_to_save=values.get("modules_to_save") or [],
            layers_to_transform=[layers] if isinstance(layers, int) else layers,
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
        )
    except FileError as error:
        raise ConfigError(f"{error} Save the adapter anew.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a LoRA configuration: {error!r}. Save the adapter anew.") from None


def init_adapter_problem(student: StudentSection) -> str | None:
    """Why student.init_adapter cannot start the adapters that student.lora describes; None where it can.

    Raises:
        ConfigError: there is no adapter, or it cannot be read.
    """
    assert student.init_adapter is not None
    saved = adapter_settings(find_adapter(student.init_adapter, "student.init_adapter"))
    names = ("r", "alpha", "use_dora", "use_rslora", "layers_to_transform")
    other = [n for n in names if getattr(saved, n) != getattr(student.lora, n)]
    if not other:
        return None
    theirs = ", ".join(f"{n}={getattr(saved, n)}" for n in other)
    ours = ", ".join(f"{n}={getattr(student.lora, n)}" for n in other)
    remedy = " ".join(f"--set student.lora.{n}={getattr(saved, n)}" for n in other)
    return (
        f"student.init_adapter={student.init_adapter} was trained with {theirs}, but student.lora has {ours}. Use the "
        f"same: {remedy}"
    )

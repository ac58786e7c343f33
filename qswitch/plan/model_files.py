"""Where the description of a model is found: in its files, the hub's cache, a `shape` block, or on the hub. Cold.

Reads config.json and the chat template, or the header of a GGUF file; never weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qswitch.config import StudentSection, TeacherSection
from qswitch.errors import ConfigError, FileError
from qswitch.hub import HUB_ID, TOKEN_REMEDY, forbidden_by, hub_cache, is_hub_id, package_file
from qswitch.outside import read_json, read_text, user_path
from qswitch.plan.families import shape_from_config
from qswitch.plan.gguf_header import config_of_gguf, read_header
from qswitch.plan.shapes import ModelShape

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""Where the chat template of a tokenizer lies, newest form first."""


def shape_for(section: TeacherSection | StudentSection) -> ModelShape:
    """The shape of a model section: of its folder, its GGUF file or the hub's cache, else its `shape` block.

    The file is the model, a block only describes it, so the file comes first; the block stands in for models that
    transformers does not know. With neither, config.json (a few KB, nothing else) is asked of the hub. A student with
    shrink_to_layers is returned after the cut.

    Raises:
        ConfigError: no configuration is at hand, it describes no model that can be distilled, shrink_to_layers does
            not cut it, or it has not the layers that lora.layers_to_transform names.
    """
    role = "student" if isinstance(section, StudentSection) else "teacher"
    try:
        shape = _shape(section, role)
    except ConfigError as error:
        raise ConfigError([_of_role(problem, role) for problem in error.problems]) from None
    return _student_shape(section, shape) if isinstance(section, StudentSection) else shape


def _student_shape(section: StudentSection, shape: ModelShape) -> ModelShape:
    """The shape after the cut, whose layers those that get adapters are counted in."""
    layers = section.shrink_to_layers
    if layers is not None:
        if layers > shape.num_layers:
            raise ConfigError(
                f"student.shrink_to_layers is {layers}, but the model has {shape.num_layers} layers. Lower it."
            )
        shape = shape.with_layers(layers)
    beyond = [i for i in section.lora.layers_to_transform or [] if i >= shape.num_layers]
    if beyond:
        raise ConfigError(
            f"student.lora.layers_to_transform names layer {beyond[0]}, but the student has {shape.num_layers} layers, "
            f"0 to {shape.num_layers - 1}. Remove it."
        )
    return shape


def gguf_at_hand(section: TeacherSection | StudentSection) -> Path | None:
    """The GGUF file that a model section means; None where it means none, or it is not here."""
    return _at_hand(section)[0]


def folder_at_hand(section: TeacherSection | StudentSection) -> Path | None:
    """The folder of a model section, its own or in the hub's cache; None where it is a file, or not here."""
    config = _at_hand(section)[1]
    return None if config is None else config.parent


def chat_template(section: TeacherSection | StudentSection) -> str | None:
    """The Jinja template of the model's tokenizer: of its files, else of the hub, which is not asked about a model
    whose shape is written out. None where there is none, or none to be had."""
    references = [section.model] if isinstance(section.model, str) else section.model
    try:
        if (file := gguf_at_hand(section)) is not None:
            return _text_or_none(read_header(file)[0].get("tokenizer.chat_template"))
        folder = folder_at_hand(section)
        for name in TEMPLATE_FILES:
            if folder is not None and (folder / name).is_file():
                return _template_in(name, read_text(folder / name))
        on_hub = [r for r in references if is_hub_id(r)]
        if section.shape is not None or not on_hub or forbidden_by() is not None:
            return None
    except (ConfigError, FileError, ValueError):
        return None
    for name in TEMPLATE_FILES:
        try:
            return _template_in(name, _ask_hub(on_hub[0], section.revision, name).decode())
        except (OSError, ValueError):
            continue
    return None


def _template_in(name: str, text: str) -> str | None:
    """The template of a file of that name; of several in a tokenizer_config.json the one called default."""
    if name.endswith(".jinja"):
        return text
    values = json.loads(text)
    found = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return _text_or_none(found)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _of_role(problem: str, role: str) -> str:
    """The problem with the setting it belongs to."""
    if problem.startswith("shape."):
        return f"{role}.{problem}"
    return problem if problem.startswith(f"The shape of {role}") else f"{role}.model: {problem}"


def _shape(section: TeacherSection | StudentSection, role: str) -> ModelShape:
    at_hand = _config_at_hand(section)
    if section.shape is None:
        values = at_hand if at_hand is not None else _published_config(section, role)
        return shape_from_config(values, section.trust_remote_code)
    if at_hand is not None:
        try:
            return shape_from_config(at_hand)
        except ConfigError:
            pass  # a model that only the block describes
    return shape_from_config(section.shape)


def _config_at_hand(section: TeacherSection | StudentSection) -> Mapping[str, Any] | None:
    """config.json of the first reference that a local folder, a GGUF file or the hub cache has."""
    file, config = _at_hand(section)
    if file is not None:
        return config_of_gguf(file)
    return None if config is None else _read_config(config)


def _at_hand(section: TeacherSection | StudentSection) -> tuple[Path | None, Path | None]:
    """The GGUF file or the config.json, of the first reference that is here; neither where none is."""
    references = [section.model] if isinstance(section.model, str) else section.model
    for reference in references:
        file = _gguf_file(reference)
        if file is not None:
            return file, None
        for path in _config_paths(reference, section.revision):
            if path.is_file():
                return None, path
    return None, None


def _gguf_file(reference: str) -> Path | None:
    """The GGUF file that a path or a `package:` reference names, where it is here."""
    if reference.startswith("package:"):
        try:
            path = package_file(reference)
        except LookupError:
            return None
    else:
        path = user_path(reference)
    return path if path.suffix == ".gguf" and path.is_file() else None


def _published_config(section: TeacherSection | StudentSection, role: str) -> Mapping[str, Any]:
    """config.json of a hub model, read and not kept; the download of the model puts it into the cache.

    Not through huggingface_hub, which retries for 23 s before it says that there is no network.
    """
    references = [section.model] if isinstance(section.model, str) else section.model
    reasons = []
    for reference in references:
        if not is_hub_id(reference):
            kind = _no_package_because(reference) if reference.startswith("package:") else _no_model_because(reference)
            reasons.append(f"{reference}: {kind}")
        elif (variable := forbidden_by()) is not None:
            reasons.append(f"{reference}: not in the hub cache, and {variable} forbids to ask the hub")
        else:
            try:
                values = json.loads(_ask_hub(reference, section.revision, "config.json"))
                if not isinstance(values, dict):
                    raise ValueError("its config.json is no JSON object")
                return values
            except (OSError, ValueError) as error:  # HTTPError and URLError are OSErrors
                reasons.append(f"{reference}: {_hub_answer(error, reference)}")
    raise ConfigError(
        f"The shape of {role}.model is not known: {'; '.join(reasons)}. Mend {role}.model, or give {role}.shape "
        "(values of config.json) to plan without it."
    )


def _no_package_because(reference: str) -> str:
    try:
        return f"{package_file(reference).name} is no .gguf file"
    except LookupError as error:
        return str(error.args[0])


def _no_model_because(reference: str) -> str:
    path = user_path(reference)
    if not path.exists():
        return "there is no such folder"
    if path.is_file():
        return "a file; name the folder that holds config.json and the weights"
    if (path / "adapter_config.json").is_file():
        return "an adapter, no model; name its base here"
    if (path / "plan.json").is_file():
        return "a run directory, no model; `qswitch merge` makes a model of it"
    return "the folder has no config.json"


def _ask_hub(reference: str, revision: str | None, name: str) -> bytes:
    import urllib.request  # here: a plan from files needs no network client

    from huggingface_hub import constants, get_token, hf_hub_url

    request = urllib.request.Request(hf_hub_url(reference, name, revision=revision))
    if token := get_token():
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=constants.HF_HUB_ETAG_TIMEOUT) as answer:
        return bytes(answer.read())


def _hub_answer(error: Exception, reference: str) -> str:
    code = getattr(error, "code", None)
    if code in (401, 403):
        page = f"https://huggingface.co/{reference}"
        return f"the hub knows no such model, or it is gated: accept its licence at {page}, then {TOKEN_REMEDY}"
    if code == 404:
        return "the hub has no config.json under this id; check its spelling and the revision"
    return f"the hub did not answer ({getattr(error, 'reason', error)}); download the model first"


def _config_paths(reference: str, revision: str | None) -> list[Path]:
    """Where config.json of a reference may lie, best first."""
    if reference.startswith("package:"):
        return []
    paths = [user_path(reference) / "config.json"]
    if HUB_ID.fullmatch(reference) is None:
        return paths
    repository = hub_cache() / f"models--{reference.replace('/', '--')}"
    named = repository / "refs" / (revision or "main")
    commits = [revision] if revision else []
    if named.is_file():
        commits.append(read_text(named).strip())
    paths += [repository / "snapshots" / commit / "config.json" for commit in commits]
    if revision is None:
        paths += sorted(repository.glob("snapshots/*/config.json"))
    return paths


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        return read_json(path, dict[str, Any])
    except FileError as error:
        raise ConfigError(f"{path} cannot be read, or is not a model configuration: {error}") from None

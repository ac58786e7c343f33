"""Imports point down the list of stages, and the commands that need no model import no torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qswitch

PACKAGE = Path(qswitch.__file__).parent
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes")

ARCHITECTURE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")

# Higher may import lower and its equals.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["cli_results", "cli_student"],
    ["cli_options", "console", "api"],
    ["doctor", "teach"],
    ["run"],
    ["report"],
    ["compare"],
    ["evaluate", "export"],
    ["distill.session", "distill.teaching", "distill.teacher_text"],
    ["preflight", "choose"],
    ["distill.answers"],
    ["distill.trainer"],
    ["rollout", "distill"],
    ["models", "data"],
    ["preset_info"],
    ["plan", "presets", "run_dir"],
    ["layers", "limits"],
    ["config"],
    ["rules"],
    ["methods"],
    ["yaml_file", "hub", "manifest", "preset_index"],
    ["outside", "aside"],
    ["launch"],
    ["errors", "state_files", "terminal", "thinking", "time_limit", "units", "divergence", "pinned"],
]
COLD = [
    "__init__.py",
    "api.py",
    "aside.py",
    "choose.py",
    "cli.py",
    "cli_options.py",
    "cli_results.py",
    "cli_student.py",
    "config.py",
    "console.py",
    "distill/processes.py",
    "doctor.py",
    "errors.py",
    "export/push.py",
    "export/modelfile.py",
    "hub.py",
    "rules.py",
    "launch.py",
    "layers.py",
    "limits.py",
    "manifest.py",
    "methods.py",
    "models/gguf_cache.py",
    "outside.py",
    "preflight.py",
    "preset_index.py",
    "preset_info.py",
    "presets.py",
    "run.py",
    "teach.py",
    "run_dir.py",
    "state_files.py",
    "terminal.py",
    "thinking.py",
    "time_limit.py",
    "units.py",
    "yaml_file.py",
    "distill/__init__.py",
    "plan",
]
COLD_NAMES = [f"{name}/" if (PACKAGE / name).is_dir() else name for name in COLD]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> int:
    """Depth of a module; the longest name that fits decides."""
    fits = [
        (len(name), depth)
        for depth, names in enumerate(LAYERS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    assert fits, f"qswitch.{module} has no place in LAYERS; give it one here and in docs/architecture.md"
    return max(fits)[1]


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported, also inside functions; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_down(path: Path):
    here = module_name(path)
    existing = {module_name(p) for p in modules()}
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        target = name.removeprefix("qswitch.")
        if name.startswith("qswitch.") and target in existing:
            assert layer(target) >= layer(here), f"qswitch.{here} imports qswitch.{target}, which is above it"


def test_the_architecture_page_has_this_list_and_a_line_for_every_file():
    stages = re.search(r"((?:^    [^\n]+ >\n)+    [^\n]+)\n\n", ARCHITECTURE, re.M)
    assert stages is not None
    assert [stage.strip().split(", ") for stage in " ".join(stages[1].split()).split(" >")] == LAYERS
    cold = re.search(r"^(`.+?`)\sand\sthe\spackage's\s`__init__`\sare\s\*cold\*", ARCHITECTURE, re.M | re.S)
    assert cold is not None and sorted([*cold[1].strip("`").split(), "__init__.py"]) == sorted(COLD_NAMES)
    described = set()
    for line in re.findall(r"^      (\S+\.py.*)$", ARCHITECTURE, re.M):
        first, *others = re.findall(r"[\w/]+\.py(?=,|  | |$)", line)
        described |= {first, *(f"{first.rpartition('/')[0]}/{name}".lstrip("/") for name in others)}
    there = {p.relative_to(PACKAGE).as_posix() for p in modules() if p.name != "__init__.py"}
    assert described == there


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in modules() if path.name != "__init__.py")
    assert [name for name, times in names.items() if times > 1] == []


def test_no_circle_of_imports():
    """Neither at the top of a module, nor inside a function, nor for types alone."""
    existing = {module_name(p) for p in modules()}
    below = {
        module_name(p): {name.removeprefix("qswitch.") for name in imports(ast.parse(p.read_text(encoding="utf-8")))}
        & (existing - {module_name(p)})
        for p in modules()
    }
    try:
        list(TopologicalSorter(below).static_order())
    except CycleError as error:
        pytest.fail("modules import each other: " + " <- ".join(error.args[1]))


def test_rollout_knows_no_cache_cache_no_model_policy_no_tokenizer_trainer_no_typer():
    def imported(name: str) -> set[str]:
        return imports(ast.parse((PACKAGE / name).read_text(encoding="utf-8")))

    for path in (PACKAGE / "rollout").glob("*.py"):
        assert "qswitch.distill.logit_cache" not in imported(f"rollout/{path.name}"), path.name
    assert not any(m.startswith(("qswitch.models", "transformers")) for m in imported("distill/logit_cache.py"))
    assert not any(m.startswith(("transformers", "tokenizers", "qswitch.data")) for m in imported("rollout/policy.py"))
    for path in (PACKAGE / "distill").glob("*.py"):
        assert not any(m.split(".")[0] == "typer" for m in imported(f"distill/{path.name}")), path.name


def test_a_home_folder_is_expanded_in_one_place():
    """`Path.expanduser` fails for a home that nobody has, and a path must mean the same wherever it is read."""
    texts = {module_name(path): path.read_text(encoding="utf-8") for path in modules()}
    # `hub` reads a variable of huggingface_hub as that does.
    assert {name for name, text in texts.items() if "expanduser" in text} == {"outside", "hub"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_importing_a_cold_module_loads_nothing_heavy():
    names = []
    for entry in COLD:
        path = PACKAGE / entry
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            names.append("qswitch." + module_name(file) if file != PACKAGE / "__init__.py" else "qswitch")
    code = f"import sys\n{chr(10).join('import ' + n for n in names)}\nprint([m for m in {HEAVY} if m in sys.modules])"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


COMMANDS = [
    ["--help"],
    ["distill", "--help"],
    ["--version"],
    ["presets", "list"],
    ["distill", "--dry-run", "--preset", "smollm2-demo"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_cold_command_imports_nothing_heavy(command: list[str]):
    code = (
        "import json, sys\n"
        "from qswitch.cli import run\n"
        f"code = run({command!r})\n"
        f"print(json.dumps([code, [m for m in {HEAVY} if m in sys.modules]]), file=sys.stderr)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stderr.splitlines()[-1]) == [0, []]

"""qswitch: distil a large language model into a small one on one consumer GPU, with the SWITCH method.

    import qswitch

    config = qswitch.configure("qwen2.5-7b-to-1.5b", data="my_prompts.jsonl")
    print(qswitch.plan(config, gpu="rtx3060-12gb").fits)
    run = qswitch.distill(config, "runs/mine")

The functions are those of `qswitch/api.py`. Importing the package costs nothing: no torch, no transformers. Each stage
of the journey is a folder; see docs/architecture.md.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inspect import Signature

    from qswitch.api import Run, configure, distill, load_run, plan

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "configure", "distill", "load_run", "plan"]


class Stage(ModuleType):
    """A folder of the package that is called like a function of `qswitch.api`, and so can be called as one.

    `qswitch.plan` and `qswitch.distill` are folders, and Python binds their names here as soon as anything in them is
    imported. Were the functions bound in their place, `import qswitch.plan.machine as machine` would fail.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function()(*arguments, **named)

    @property
    def __signature__(self) -> Signature:  # for help in notebooks and editors
        import inspect

        return inspect.signature(self._function())

    def _function(self) -> Any:
        return getattr(importlib.import_module("qswitch.api"), self.__name__.rpartition(".")[2])


def __getattr__(name: str) -> Any:
    if name in ("distill", "plan"):
        return importlib.import_module(f"qswitch.{name}")
    if name in __all__:
        return getattr(importlib.import_module("qswitch.api"), name)
    raise AttributeError(f"module 'qswitch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

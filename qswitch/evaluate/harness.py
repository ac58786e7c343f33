"""Tasks of EleutherAI's lm-evaluation-harness on a subject; an optional extra."""

from __future__ import annotations

import importlib.util
from typing import Any

from qswitch.errors import ConfigError, DataError
from qswitch.evaluate.subjects import Subject


def require_harness() -> None:
    """Raises ConfigError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--lm-eval needs EleutherAI's harness. In the checkout: pip install '.[lm-eval]', or pip install lm-eval."
        )


def run_tasks(
    subject: Subject, tasks: list[str], *, limit: int | None, batch_size: int, device: str | None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, as the harness reports them (its own prompts, without chat template).

    A task is a name that the harness knows, or the path of a task's YAML file.

    Raises:
        ConfigError: the harness is missing.
        DataError: it knows no such task, or cannot get its data.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = subject.load(device)
    model = HFLM(
        pretrained=loaded.model.hf, tokenizer=loaded.tokenizer, batch_size=batch_size,
        device=str(loaded.model.device), backend="causal",
    )  # fmt: skip
    try:
        found: Any = simple_evaluate(model=model, tasks=list(tasks), limit=limit, bootstrap_iters=0)
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise DataError(f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    return {
        task: {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and name != "sample_len"
        }
        for task, values in found["results"].items()
    }

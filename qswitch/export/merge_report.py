"""What a merged folder says of itself: how far it is from its adapter, and of which weights it is the merge.

Cold: knows no torch and no weights but their bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qswitch.errors import FileError, ModelError
from qswitch.manifest import MANIFEST
from qswitch.models.messages import first_line
from qswitch.outside import read_json
from qswitch.run_dir import RunDir
from qswitch.state_files import SummaryFile

MERGED_FOLDER = "merged"
"""Of a run directory."""
REPORT_FILE = "merge.json"
MAX_MERGE_ERROR = 1e-4
"""Largest logit difference of the fp32 merge against base + adapter, passes in fp64; above it nothing is written."""
MAX_KL_NATS = 1e-3
"""Of the saved model against base + adapter."""
END_TOKENS_FILE = "generation_config.json"
_NOT_AS_THEY_ARE = ("README.md", MANIFEST, "adapter_config.json", END_TOKENS_FILE)
"""Files of an adapter folder that do not reach the merged one, or of which only the end tokens do; they name versions,
so that a run which is resumed once more writes others."""
_OF_THE_TRAINING = ("steps", "best_step", "rollout_batches", "processes", "kl_before_nats", "kl_after_nats",
                    "response_loss_before_nats", "response_loss_after_nats")  # fmt: skip
"""What the card shows of summary.json and the training decides; time and memory are measured anew by every resume."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """Where the merged model is, and how far it is from base + adapter; MERGED/merge.json."""

    output_dir: Path
    max_logit_difference: float
    """Largest |logit difference| between base + adapter and the fp32 merge, passes in fp32."""
    pass_rounding: float
    """Largest |logit difference| of base + adapter between fp32 and fp64 arithmetic: what an fp32 pass rounds by
    itself, and so what `max_logit_difference` may contain without any fault in the merge."""
    merge_error: float
    """The same fp32 weights with passes in fp64: what merging itself changed."""
    kl_nats: float
    """KL(base + adapter || saved model), mean over the tokens of the prompts, both computed in fp32."""
    num_prompts: int
    dtype: str
    source_sha256: str | None = None
    """Of what was merged (`source_of`): whether the folder is still that of the run."""
    adapter_sha256: str | None = None
    """In its place in the merges of an earlier version, which knew them by the weights alone."""

    def is_of(self, run_dir: RunDir, weights: Path) -> bool:
        """Whether `weights`, as `RunDir.trained_weights` names them, are what was merged."""
        if self.adapter_sha256 is not None:
            return self.adapter_sha256 == _sha256([], sorted(weights.glob("*.safetensors")))
        return self.source_sha256 == source_of(run_dir, weights)

    @property
    def agrees(self) -> bool:
        """Whether merge error and KL are within their limits."""
        return self.merge_error <= MAX_MERGE_ERROR and self.kl_nats <= MAX_KL_NATS


def read_merge_report(folder: Path) -> MergeReport | None:
    """MERGED/merge.json; None where the folder is no finished merge.

    Raises:
        ModelError: it is damaged, or of another version of qswitch.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        return MergeReport(**{**read_json(path, dict[str, Any]), "output_dir": folder})
    except (FileError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}). Remove {folder} and merge again.") from None


def source_of(run_dir: RunDir, weights: Path) -> str:
    """SHA-256 of what a merge takes from a run: weights, tokenizer, template, end tokens, and figures of its card.

    `weights` is the folder that `RunDir.trained_weights` names. A checkpoint has its weights alone, so the merge of one
    is another than that of the finished run, even where the weights are the same.

    Raises:
        FileError: summary.json or the end tokens cannot be read.
    """
    summary, ends = training_summary(run_dir, weights), weights / END_TOKENS_FILE
    figures = [summary.get(key) for key in _OF_THE_TRAINING]
    end_tokens = read_json(ends, dict[str, Any]).get("eos_token_id") if ends.is_file() else None
    files = sorted(path for path in weights.iterdir() if path.is_file() and path.name not in _NOT_AS_THEY_ARE)
    return _sha256([json.dumps([figures, end_tokens]), *(path.name for path in files)], files)


def training_summary(run_dir: RunDir, weights: Path) -> dict[str, Any]:
    """What the card says of the training; of a checkpoint only its step.

    Raises:
        FileError: summary.json cannot be read.
    """
    if weights != run_dir.adapter_path:
        return {"steps": int(weights.parent.name.removeprefix("step-"))}
    return dict(read_json(run_dir.summary_path, SummaryFile)) if run_dir.summary_path.is_file() else {}


def _sha256(texts: Sequence[str], files: Sequence[Path]) -> str:
    """Of texts, then of the content of files."""
    digest = hashlib.sha256("".join(f"{text}\n" for text in texts).encode())
    for path in files:
        with path.open("rb") as handle:
            while block := handle.read(2**24):
                digest.update(block)
    return digest.hexdigest()

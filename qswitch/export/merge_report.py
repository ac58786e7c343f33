"""What a merged folder says of itself: how far it is from its adapter, and of which weights it is the merge.

Cold: knows no torch and no weights but their bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qswitch.errors import FileError, ModelError
from qswitch.manifest import MANIFEST
from qswitch.models.messages import first_line
from qswitch.outside import read_json
from qswitch.run_dir import RunDir

MERGED_FOLDER = "merged"
"""Of a run directory."""
REPORT_FILE = "merge.json"
MAX_MERGE_ERROR = 1e-4
"""Largest logit difference of the fp32 merge against base + adapter, passes in fp64; above it nothing is written."""
MAX_KL_NATS = 1e-3
"""Of the saved model against base + adapter."""
_NOT_MERGED = ("README.md", MANIFEST)
"""Files of an adapter folder of which nothing reaches the merged one."""


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
    source_sha256: str
    """Of what was merged (`source_of`): whether the folder is still that of the run."""

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
    """SHA-256 of what a merge takes from a run: weights, tokenizer, template and end tokens beside them, and figures.

    `weights` is the folder that `RunDir.trained_weights` names. A checkpoint has its weights alone, so the merge of one
    is another than that of the finished run, even where the weights are the same.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in weights.iterdir() if path.is_file() and path.name not in _NOT_MERGED)
    for path in [*files, *([run_dir.summary_path] if run_dir.summary_path.is_file() else [])]:
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            while block := handle.read(2**24):
                digest.update(block)
    return digest.hexdigest()

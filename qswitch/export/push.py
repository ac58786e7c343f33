"""A merged model on the Hugging Face hub: which files go there, and sending them.

huggingface_hub resumes an upload by itself: the same call skips what is there. Cold until something is sent.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qswitch.errors import ModelError, storage_problem
from qswitch.export.merge_report import MERGED_FOLDER, read_merge_report
from qswitch.hub import HUB_ID
from qswitch.models.messages import first_line
from qswitch.outside import read_text
from qswitch.run_dir import RunDir

CARD = "README.md"
PLACEHOLDER = "path/to/this/folder"
"""Stands in the card where the repository's name belongs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """A merged model and where it is, or would be."""

    repository: str
    folder: Path
    files: dict[str, int]
    """Name in the folder and in the repository -> bytes."""
    private: bool
    """Whether a new repository is private."""
    url: str | None
    """None where nothing was sent."""


def list_files(path: Path, repository: str) -> tuple[Path, dict[str, int]]:
    """The merged folder that `path` (a run directory or that folder) means, and file name -> bytes of what it holds.

    Hidden files stay at home.

    Raises:
        ModelError: nothing was merged there, `repository` is no ORG/NAME, or the run has gone on since it was merged.
    """
    if not HUB_ID.fullmatch(repository) or repository.count("/") != 1:
        raise ModelError(f"{repository} is no repository of the hub. Write ORG/NAME, for example my-name/my-student.")
    folder = path if (path / "config.json").is_file() else path / MERGED_FOLDER
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no merged model. Make it first: qswitch merge {path}")
    if folder != path:
        _refuse_older_merge(path, folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {p.relative_to(folder): p.stat().st_size for p in files}
    return folder, {str(n): size for n, size in names.items() if not any(part.startswith(".") for part in n.parts)}


def push_run(path: Path, repository: str, *, private: bool, dry_run: bool = False) -> Push:
    """Send a merged model, making the repository if there is none; with dry_run only say what would be sent.

    An existing repository keeps its visibility. The card's example then loads the repository.

    Raises:
        ModelError: nothing was merged there, the hub refuses or cannot be reached; the same call goes on later.
        FileError: the card cannot be read.
    """
    folder, files = list_files(path, repository)
    if dry_run:
        return Push(repository=repository, folder=folder, files=files, private=private, url=None)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    with tempfile.TemporaryDirectory() as work:
        _stage(folder, files, Path(work), repository)  # what fails here is of this machine
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=work, commit_message="Model distilled with qswitch")
        except LocalTokenNotFoundError:
            raise ModelError("The hub needs to know who you are: set HF_TOKEN to a token that may write.") from None
        except HfHubHTTPError as error:
            raise ModelError(f"{repository}: {_refusal(error)}") from error
        except Exception as error:  # the client's errors of the network change their classes with its releases
            if storage_problem(error) is not None:
                raise
            raise ModelError(
                f"{repository}: the hub cannot be reached ({first_line(error)}). The same call goes on later."
            ) from error
    return Push(repository=repository, folder=folder, files=files, private=private, url=f"{api.endpoint}/{repository}")


def _refuse_older_merge(path: Path, folder: Path) -> None:
    """Nothing, or an error where a run directory has other weights by now than its merged folder."""
    if not (path / "config.yaml").is_file() or (report := read_merge_report(folder)) is None:
        return  # a folder that somebody else put together
    run_dir = RunDir.open(path)
    if not report.is_of(run_dir, run_dir.trained_weights()):
        raise ModelError(
            f"{folder} was merged before {path} went on, or was changed. Remove it and merge again (`qswitch merge "
            f"{path}`), or name {folder} itself to send it as it is."
        )


def _stage(folder: Path, files: dict[str, int], staged: Path, repository: str) -> None:
    """The files by links, and the card with the repository's name where the folder's own card has a placeholder."""
    for name in files:
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == CARD:
            text = read_text(folder / name)
            path.write_text(text.replace(PLACEHOLDER, repository), encoding="utf-8")
        else:
            path.symlink_to((folder / name).resolve())


def _refusal(error: Any) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses (HTTP {status}). Set HF_TOKEN to a token that may write there."
    return f"the hub answers HTTP {status} ({first_line(error)}). The same call goes on where it was."

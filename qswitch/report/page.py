"""One offline HTML page about a run, or about several: what the student answers, what came out, how it went.

Reads run directories only; no model is loaded and nothing is fetched. The page holds everything it shows. What models
and users wrote reaches it as escaped text; the one script is ours, and the page's policy allows it alone, by its hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from qswitch.report.charts import validation_charts
from qswitch.report.read import ANSWERS_SHOWN, duration, names_of, view
from qswitch.run_dir import RunDir, write_atomically

if TYPE_CHECKING:
    from jinja2 import Template


def write_report(run_paths: Sequence[Path | str], output: Path | None = None) -> Path:
    """Write one page about the runs and return its path: `output`, or report.html in the run, of several in the
    current folder.

    Raises:
        RunDirError: one of run_paths is no run directory.
    """
    opened = [RunDir.open(Path(path)) for path in run_paths]
    run_dirs = list({run_dir.path.resolve(): run_dir for run_dir in opened}.values())  # one named twice is shown once
    path = output or (run_dirs[0].report_path if len(run_dirs) == 1 else Path("report.html"))
    write_atomically(path, render_page(run_dirs))
    return path


@functools.cache
def page_template() -> Template:
    """The page with its blanks; compiled once in a process, which takes longer than to fill them in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qswitch.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    return environment.get_template("report.html")


def render_page(run_dirs: Sequence[RunDir]) -> str:
    """The page as text; a run that has not finished gives what there is."""
    templates = resources.files("qswitch.report") / "templates"
    script = (templates / "report.js").read_text(encoding="utf-8")
    runs = [view(run_dir, name) for run_dir, name in zip(run_dirs, names_of(run_dirs), strict=True)]
    compared = validation_charts([(run.name, run.lines, run.summary) for run in runs]) if len(runs) > 1 else []
    return page_template().render(
        runs=runs,
        compared=compared,
        answers_shown=ANSWERS_SHOWN,
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )

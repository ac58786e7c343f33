"""One offline HTML page about a run, or about several: what the student answers, what came out, how it went.

Reads run directories only; no model is loaded and nothing is fetched. The page holds everything it shows. What models
and users wrote reaches it as escaped text; the one script is ours, and the page's policy allows it alone, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qswitch.report.charts import validation_charts
from qswitch.report.read import ANSWERS_SHOWN, duration, view
from qswitch.run_dir import RunDir, write_atomically


def write_report(run_paths: Sequence[Path | str], output: Path | None = None) -> Path:
    """Write one page about the runs and return its path: `output`, or report.html in the run, of several in the
    current folder.

    Raises:
        RunDirError: one of run_paths is no run directory.
    """
    run_dirs = [RunDir.open(Path(path)) for path in run_paths]
    path = output or (run_dirs[0].report_path if len(run_dirs) == 1 else Path("report.html"))
    write_atomically(path, render_page(run_dirs))
    return path


def render_page(run_dirs: Sequence[RunDir]) -> str:
    """The page as text; a run that has not finished gives what there is."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qswitch.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    templates = resources.files("qswitch.report") / "templates"
    script = (templates / "report.js").read_text(encoding="utf-8")
    runs = [view(run_dir) for run_dir in run_dirs]
    compared = validation_charts([(run.name, run.lines, run.summary) for run in runs]) if len(runs) > 1 else []
    return environment.get_template("report.html").render(
        runs=runs,
        compared=compared,
        answers_shown=ANSWERS_SHOWN,
        style=(templates / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )

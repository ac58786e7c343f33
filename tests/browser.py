"""Chromium, where it is installed, for pages that qswitch writes; tests that need it are skipped elsewhere."""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (1400, 390)


@functools.cache
def _chromium() -> Any:
    """One browser for all tests of a process; starting one takes longer than a test."""
    required = os.environ.get("QSWITCH_BROWSER") == "required"  # `make browser` sets it: no test may be left out there
    unavailable = pytest.fail if required else pytest.skip
    try:
        import playwright.sync_api as playwright
    except ImportError:
        unavailable("needs `pip install playwright`")
    driver = playwright.sync_playwright().start()
    atexit.register(driver.stop)
    executable = shutil.which("chromium")  # else playwright's own
    if executable is None and not Path(driver.chromium.executable_path).exists():
        unavailable("needs Chromium (Debian: apt-get install chromium)")
    browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
    atexit.register(browser.close)
    return browser


@contextmanager
def opened(path: Path | str, *, width: int = 1400, scheme: str = "light", fragment: str = "") -> Iterator[Any]:
    """A file, or a page of a server on this machine, in a headless Chromium, as playwright's Page.

    It must print no error and ask nobody but that server.
    """
    page = _chromium().new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    address = path if isinstance(path, str) else path.resolve().as_uri()
    page.goto(address + fragment)
    yield page
    page.close()
    assert not errors, errors
    origin = re.match(r"file:|http://localhost:\d+/", address)
    assert origin and all(url.startswith((origin[0], "data:", "blob:" + origin[0])) for url in asked), asked


def scrolls_sideways(page: Any) -> bool:
    """Whether the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")

"""Chromium, where it is installed, for pages that qswitch writes; tests that need it are skipped elsewhere."""

from __future__ import annotations

import atexit
import functools
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
    playwright = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    driver = playwright.sync_playwright().start()
    atexit.register(driver.stop)
    browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
    atexit.register(browser.close)
    return browser


@contextmanager
def opened(path: Path, *, width: int = 1400, scheme: str = "light", fragment: str = "") -> Iterator[Any]:
    """The page at `path` in a headless Chromium, as playwright's Page; it must ask no host and print no error."""
    page = _chromium().new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.resolve().as_uri() + fragment)
    yield page
    page.close()
    assert not errors, errors
    assert all(url.startswith("file:") for url in asked), asked


def scrolls_sideways(page: Any) -> bool:
    """Whether the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")

"""The documentation as a site, built and looked at in a browser. Skipped where mkdocs or Chromium is missing."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import WIDTHS, opened, scrolls_sideways

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """The built pages, and the address of a server of them: search does not work from files."""
    if os.environ.get("QSWITCH_BROWSER") != "required":
        pytest.importorskip("mkdocs")
        pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://localhost:{server.server_port}/"
    server.shutdown()


def test_every_page_fits_its_window_prints_no_error_and_asks_no_host(site):
    folder, address = site
    pages = sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("index.html"))
    assert len(pages) > 20
    wide = []
    for i, page in enumerate(pages):
        # Every page in one scheme and at both widths; the schemes take turns.
        for width in WIDTHS:
            with opened(f"{address}{page}/", width=width, scheme=("light", "dark")[i % 2]) as opened_page:
                opened_page.wait_for_load_state("networkidle")
                if scrolls_sideways(opened_page):
                    wide.append((page, width))
    assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_follows_the_readers_scheme(site, scheme):
    _, address = site
    with opened(address, scheme=scheme) as page:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        channels = [float(x) for x in background[background.index("(") + 1 : -1].split(",")[:3]]
        assert (sum(channels) > 600) == (scheme == "light"), background


def test_search_finds_a_setting(site):
    _, address = site
    with opened(address) as page:
        page.locator("input.md-search__input").fill("decay_rate")
        page.locator(".md-search-result__item").first.wait_for()
        assert "decay_rate" in page.locator(".md-search-result__list").inner_text()

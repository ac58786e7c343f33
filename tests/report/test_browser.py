"""The report in a browser: what a reader can point at, press and print. Skipped where there is no Chromium."""

from __future__ import annotations

from pathlib import Path

import pytest

from qswitch.report.page import write_report
from tests.browser import WIDTHS, opened, scrolls_sideways
from tests.report.test_page import make_run


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    # Long words without a break, and tags, as a small model writes them.
    hostile = "</span><b>bold</b> " + "x" * 300
    runs = [make_run(folder / name, hostile=hostile) for name in ("first-run-with-a-rather-long-name" * 3, "second")]
    return write_report([run.path for run in runs], folder / "report.html")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_scrolls_sideways_in_either_scheme(report, width, scheme):
    with opened(report, width=width, scheme=scheme) as page:
        assert not scrolls_sideways(page)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(int(x) for x in background[4:-1].split(","))
        assert (brightness > 600) == (scheme == "light")
        assert page.locator("b", has_text="bold").count() == 0, "what a model wrote is text"


def test_pointing_at_a_token_shows_what_is_known_of_it(report):
    with opened(report) as page:
        detail = page.locator("#run-1 .detail")
        assert "JSD 0.800 > threshold 0.400 bits" in detail.inner_text(), (
            "the first intervention is shown as an example"
        )
        page.locator("#run-1 .rollout:visible .w").nth(1).hover()
        text = detail.inner_text()
        for piece in ("JSD 0.800 > threshold 0.400 bits", "friend", "there", "teacher"):
            assert piece in text, piece
        page.locator("#run-1 .rollout:visible .text").focus()
        page.keyboard.press("ArrowLeft")
        assert "0.100 ≤ threshold 0.900" in detail.inner_text()
        page.keyboard.press("ArrowRight")
        assert "0.800 > threshold 0.400" in detail.inner_text()


def test_a_line_end_can_be_pointed_at(report):
    with opened(report) as page:
        page.locator("#run-1 .rollout:visible .w.break").hover()
        assert "JSD 0.300 ≤ threshold 0.350" in page.locator("#run-1 .detail").inner_text()


def test_rollouts_are_shown_one_at_a_time(report):
    with opened(report) as page:
        heading = page.locator("#run-1 .rollout:visible h3")
        assert heading.inner_text().startswith("step 1 ")
        page.locator("#run-1 .next").click()
        assert heading.inner_text().startswith("step 2 ")
        page.locator("#run-1 .browse select").select_option(index=23)
        assert heading.inner_text().startswith("step 30 ")
        page.locator("#run-1 .next").click()
        assert heading.inner_text().startswith("step 1 "), "after the last comes the first"


def test_the_run_switch_by_pointer_by_keyboard_and_by_address(report):
    with opened(report) as page:
        first, second = page.locator("#run-1"), page.locator("#run-2")
        assert first.is_visible() and not second.is_visible()
        page.locator("#tab-2").click()
        assert second.is_visible() and not first.is_visible() and page.url.endswith("#run-2")
        page.keyboard.press("ArrowLeft")
        assert first.is_visible() and page.evaluate("document.activeElement.id") == "tab-1"
    with opened(report, fragment="#run-2") as page:
        assert page.locator("#run-2").is_visible() and not page.locator("#run-1").is_visible()


def test_paper_gets_ink_on_white_and_no_buttons(report):
    with opened(report, scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert not page.locator(".browse:visible, .tabs:visible").count()

# SPDX-License-Identifier: Apache-2.0
"""The status page in a real browser: what a person sees, hears and reaches by keyboard, of any number of volumes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import pytest

from csi_driver.embedded.server import StorageServer
from tests.browser.conftest import HOSTILE, PASSWORD, SIZES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VIEWS = ("", "volumes", "volumes?unhealthy=1", "volume?name=a-first", "attachments", "snapshots", "errors")
THEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")

# The contrast of each text with what is behind it, where it is too small (WCAG 2.2, 1.4.3).
_LOW_CONTRAST = """() => {
  const numbers = color => color.match(/[0-9.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let each = element; each; each = each.parentElement) {
      const color = numbers(getComputedStyle(each).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, style = getComputedStyle(element);
    const isShown = element.getClientRects().length && !element.closest('.hidden');
    if (!isShown || !texts.currentNode.textContent.trim()) continue;
    count += 1;
    const pair = [luminance(numbers(style.color)), luminance(behind(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (isLarge ? 3 : 4.5)) found.push([texts.currentNode.textContent.trim(), ratio]);
  }
  return [count, found];
}"""

# What a screen reader needs, where it is missing.
_MISSING = """() => {
  const missing = [];
  const all = query => [...document.querySelectorAll(query)];
  const ids = all('[id]').map(each => each.id);
  if (new Set(ids).size !== ids.length) missing.push('an id is given twice: ' + ids);
  if (!document.documentElement.lang) missing.push('no language');
  for (const query of ['h1', 'main', 'title']) if (all(query).length !== 1) missing.push('not one ' + query);
  for (const table of all('table')) {
    if (!table.caption || !table.caption.textContent.trim()) missing.push('a table without a caption');
    for (const cell of table.querySelectorAll('th')) if (!cell.scope) missing.push('a heading cell without a scope');
    const widths = [...table.rows].map(row => row.cells.length);
    if (new Set(widths).size > 1) missing.push('rows of different lengths: ' + widths);
  }
  for (const field of all('input:not([type=hidden]), select'))
    if (!field.labels.length || !field.labels[0].textContent.trim()) missing.push('no label: ' + field.name);
  for (const each of all('a, button')) if (!each.textContent.trim()) missing.push('a link or button without a text');
  const levels = all('h1, h2, h3').map(each => Number(each.tagName[1]));
  if (levels[0] !== 1 || levels.some((level, i) => i && level > levels[i - 1] + 1)) missing.push('headings: ' + levels);
  for (const each of all('[aria-labelledby], [aria-describedby]'))
    for (const name of ['aria-labelledby', 'aria-describedby'])
      if (each.hasAttribute(name) && !document.getElementById(each.getAttribute(name))) missing.push('no ' + name);
  for (const image of all('svg')) if (!image.getAttribute('aria-label') && image.getAttribute('aria-hidden') !== 'true')
    missing.push('a drawing without a name');
  return missing;
}"""


@contextmanager
def page_of(browser: Browser, server: StorageServer, **options: Any) -> Iterator[Page]:
    """Open a page that fails for what a browser complains about: scripts, styles, policy, requests."""
    context = browser.new_context(base_url=server.url, **options)
    page, complaints = context.new_page(), list[str]()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"{request.failure} {request.url}"))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    yield page
    context.close()
    # A test that goes on at once ends the requests of the page that it leaves.
    assert [text for text in complaints if not text.startswith("net::ERR_ABORTED")] == []


def log_in(page: Page) -> None:
    page.goto("/status/")
    page.get_by_label("User").fill("admin")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("heading", name="Overview").wait_for()


@pytest.mark.parametrize("size", SIZES)
def test_each_view_is_heard_and_seen_in_both_themes_and_fits_narrow_and_zoomed_screens(
    browser: Browser, servers: dict[int, StorageServer], size: int
) -> None:
    with page_of(browser, servers[size]) as page:
        page.goto("/status/login")
        check_view(page, least_texts=4)
        log_in(page)
        for view in VIEWS:
            if size or "name=" not in view:
                answer = page.goto(f"/status/{view}")
                assert answer is not None
                assert answer.status == 200
                check_view(page, least_texts=10)


def check_view(page: Page, *, least_texts: int) -> None:
    assert page.evaluate(_MISSING) == [], page.url
    for theme in THEMES:
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        count, low = page.evaluate(_LOW_CONTRAST)
        assert count >= least_texts
        assert low == [], (page.url, theme)
    for width in (320, 640, 1280):  # 640 is what 200 % leave of 1280
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, page.url


def test_the_page_follows_the_theme_and_the_motion_that_a_user_prefers(
    browser: Browser, servers: dict[int, StorageServer]
) -> None:
    with page_of(browser, servers[0]) as page:
        page.goto("/status/login")
        shades, durations = [], []
        for theme in THEMES:
            page.emulate_media(color_scheme=theme, reduced_motion="reduce" if theme == "dark" else "no-preference")
            color = page.evaluate("getComputedStyle(document.body).backgroundColor")
            shades.append(sum(map(int, color[4:-1].split(","))))
            durations.append(page.evaluate("getComputedStyle(document.querySelector('button')).transitionDuration"))
    assert shades[0] > 600
    assert shades[1] < 100
    assert durations[0] != "0s"
    assert durations[1] == "0s"


def test_everything_is_reached_by_keyboard_and_the_focus_is_seen(
    browser: Browser, servers: dict[int, StorageServer]
) -> None:
    with page_of(browser, servers[10]) as page:
        page.goto("/status/login")
        page.keyboard.press("Tab")
        page.keyboard.type("admin")
        page.keyboard.press("Tab")
        page.keyboard.type(PASSWORD)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Overview").wait_for()
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to content")
        assert skip.evaluate("each => each === document.activeElement && each.getBoundingClientRect().top >= 0")
        page.goto("/status/volumes")
        targets = page.locator("a, button, input:not([type=hidden]), select, [tabindex='0']").count()
        reached = set()
        for _ in range(targets):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "() => { const each = document.activeElement, style = getComputedStyle(each);"
                    " return style.outlineStyle === 'none' ? 'no focus' : each.outerHTML }"
                )
            )
        assert "no focus" not in reached
        assert len(reached) == targets


def test_ten_thousand_volumes_are_walked_searched_and_turned_around(
    browser: Browser, servers: dict[int, StorageServer]
) -> None:
    with page_of(browser, servers[10_000], java_script_enabled=False) as page:
        log_in(page)
        page.get_by_role("navigation", name="Pages").get_by_role("link", name="Volumes").click()
        main = page.get_by_role("main")
        assert "1\N{EN DASH}50 of 10,000 volumes" in main.inner_text()
        assert page.get_by_role("row").count() == 51
        page.get_by_role("link", name="Next").click()
        assert "51\N{EN DASH}100 of 10,000 volumes" in main.inner_text()
        page.get_by_role("link", name="Name").click()
        assert page.get_by_role("columnheader", name="Name").get_attribute("aria-sort") == "descending"
        assert page.get_by_role("rowheader").first.inner_text().startswith("v09997")
        page.get_by_label("Name begins with").fill("v0123")
        page.get_by_role("button", name="Search").click()
        assert "10 volumes" in main.inner_text()
        page.get_by_role("link", name="Show all").click()
        page.get_by_label("Only unhealthy").check()
        page.get_by_role("button", name="Search").click()
        assert "10 volumes" in main.inner_text()
        assert page.get_by_role("cell", name="critical").count() == 10
        page.get_by_role("rowheader").get_by_role("link").last.click()
        assert page.get_by_role("heading", level=1).inner_text() == "v09005"


def test_a_volume_shows_its_attachment_and_its_tree(browser: Browser, servers: dict[int, StorageServer]) -> None:
    with page_of(browser, servers[10]) as page:
        log_in(page)
        page.goto("/status/volumes")
        page.get_by_role("link", name="a-first", exact=True).click()
        row = page.get_by_role("region", name="Attachments of a-first").get_by_role("row").last.inner_text()
        assert row.split()[:4] == ["node-1", "attached", "enabled", "SHARED_READ_WRITE"]
        assert f"team-a/{HOSTILE}" in page.get_by_role("main").inner_text()
        page.get_by_role("link", name="b-copy").click()
        tree = page.locator(".tree").inner_text().split()
        assert tree == ["volume", "a-first", "snapshot", "snap-1", "this", "volume", "b-copy"]


def test_a_wrong_password_is_said_and_heard(browser: Browser, servers: dict[int, StorageServer]) -> None:
    context = browser.new_context(base_url=servers[0].url)
    page = context.new_page()
    page.goto("/status/login")
    page.get_by_label("User").fill("admin")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    assert page.get_by_role("alert").inner_text() == "Wrong user or password."
    assert page.get_by_label("Password").input_value() == ""
    context.close()


def test_after_the_logout_nothing_is_shown_any_more(browser: Browser, servers: dict[int, StorageServer]) -> None:
    with page_of(browser, servers[10]) as page:
        log_in(page)
        page.goto("/status/volumes")
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("button", name="Log in").wait_for()
        page.go_back()
        assert page.get_by_role("heading", level=1).inner_text() == "Storage manager on node-1"
        assert page.get_by_role("row").count() == 0


def test_another_site_can_neither_show_the_page_nor_use_its_session(
    browser: Browser, servers: dict[int, StorageServer]
) -> None:
    server = servers[10]
    context = browser.new_context(base_url=server.url)
    page = context.new_page()
    log_in(page)
    requests = list[str]()
    other = context.new_page()
    other.on("response", lambda answer: requests.append(f"{answer.status} {answer.url.removeprefix(server.url)}"))
    form = f"<form method=post action={server.url}/status/logout></form><script>document.forms[0].submit()</script>"
    other.route("http://other.example/*", lambda route: route.fulfill(content_type="text/html", body=form))
    with other.expect_navigation(url=f"{server.url}/**"):
        other.goto("http://other.example/", wait_until="commit")
    assert "403 /status/logout" in requests
    frame = f"<iframe src={server.url}/status/></iframe>"
    other.route("http://frame.example/*", lambda route: route.fulfill(content_type="text/html", body=frame))
    other.goto("http://frame.example/")
    assert other.frames[1].get_by_role("heading").count() == 0
    assert page.goto("/status/volumes").status == 200  # type: ignore[union-attr]
    assert page.get_by_role("heading", name="Volumes").count() == 1
    context.close()

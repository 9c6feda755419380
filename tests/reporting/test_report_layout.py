"""The page in a browser: nothing overflows on a phone or a desk, light or dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from mmmamba_cli.reporting import build_page, read_report_data

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = (400, 1280)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LEAD = ("scenes_retention_cpu.json", "profile_scenes_long_cpu.json")
# 0 is dark and 1 is light in Chromium's setting.
SCHEMES = {"dark": 0, "light": 1}

# The frame's own policy forbids scripts, so the page around it measures. Elements that only a
# screen reader sees are a pixel wide.
MEASURE = """
<script>
addEventListener('load', () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll('details').forEach(one => one.open = true);
    const wide = [...page.querySelectorAll('body *')].filter(one => {
      const box = one.getBoundingClientRect();
      return box.width > 2 && (box.right > root.clientWidth + 1 || box.left < -1);
    }).map(one => one.tagName + '.' + (one.getAttribute('class') || ''));
    const cut = [...page.querySelectorAll('body :not(svg *)')].filter(one =>
      one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 2
      && getComputedStyle(one).display !== 'inline'
    ).map(one => one.tagName + '.' + (one.getAttribute('class') || ''));
    return {
      width: root.clientWidth, content: root.scrollWidth, wide, cut,
      dark: matchMedia('(prefers-color-scheme: dark)').matches,
      ground: getComputedStyle(page.body).backgroundColor,
    };
  });
  document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
});
</script>
"""


def measured(html: str, folder: Path, scheme: str) -> list[dict[str, object]]:
    """Widths of the page and the elements that do not fit, for each width."""
    frames = (
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{escape(html)}"></iframe>'
        for width in WIDTHS
    )
    file = folder / f"{scheme}.html"
    file.write_text(f"<!doctype html><body>{''.join(frames)}{MEASURE}", encoding="utf-8")
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    found = re.search("FOUND(.*)END", done.stdout)
    assert found is not None, done.stderr[-2000:]
    return list(json.loads(unescape(found.group(1))))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_overflows(full: tuple[Path, Path, Path], tmp_path: Path, scheme: str) -> None:
    run, other, data = full
    report = read_report_data(run, [other], [RESULTS / name for name in LEAD])
    page = build_page(report, created="2026-01-10 00:00", data=data)
    assert {"retention", "crossing", "run"} <= set(page.shown)
    found = measured(page.html, tmp_path, scheme)
    assert [one["width"] for one in found] == list(WIDTHS)
    for one in found:
        assert one["content"] == one["width"]
        assert one["wide"] == [] and one["cut"] == []
        assert one["dark"] is (scheme == "dark")
        assert one["ground"] == ("rgb(21, 23, 26)" if scheme == "dark" else "rgb(255, 255, 255)")

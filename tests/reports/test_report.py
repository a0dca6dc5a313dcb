"""The report page in a real browser: what is clicked does what it says, and nothing goes wrong on the way."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from neco_bench.reports.leaderboard import write_leaderboard
from neco_bench.reports.render import render
from neco_bench.reports.report import report_page
from neco_bench.results.schema import Result

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
DRIVER = """
<script>window.wrong = []; window.addEventListener("error", e => wrong.push(e.message)); const e0 = console.error;
console.error = (...a) => { wrong.push(a.join(" ")); e0(...a); };</script>
"""


def board(make_result: Callable[..., Result], models: int = 3, tasks: int = 2, classes: int = 3) -> list[Result]:
    """model-0 is best in task 0 and worst in task 1, and so on; families take turns."""
    made = []
    for m in range(models):
        for t in range(tasks):
            value = (0.2 + 0.5 * m / models) if t % 2 else (0.7 - 0.5 * m / models)
            made.append(
                make_result(
                    value,
                    key=f"{m:08x}{t:08x}",
                    model=f"model-{m}",
                    task=f"data{t // 2}_{'linear' if t % 2 else 'ic'}",
                    family="linear_segmentation" if t % 2 else "in_context",
                    protocol="neco-1" if t % 2 else "hbird-2",
                    per_class={"IoU": {f"class {c}": (c + 1) / (classes + 1) for c in range(classes)}},
                    provenance={
                        "weights_id": f"{m:064x}",
                        "protocol_hash": "b" * 64,
                        "dataset": {"val": {"name": f"data{t // 2}", "split": "val", "items": 3}},
                        "encoder": {"parameters": 1_000_000 * (m + 1)},
                        "cpu": "one",
                    },
                )
            )
    return made


def content(results: list[Result]) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', report_page(results), re.S)
    assert found
    return json.loads(found[1])


def test_classes_are_those_of_the_metric_that_is_shown_and_of_all_seeds(make_result: Callable[..., Result]) -> None:
    """Thresholds of correspondence sort before the primary one; a failed seed is no seed."""
    scores = [(0, 0.1235, 0.2), (1, 0.1245, 0.4)]
    per_class = [{"PCK@0.01": {"cat": 0.0, "dog": 0.0}, "PCK@0.10": {"cat": cat, "dog": None}} for _, _, cat in scores]
    common = {"primary_metric": "PCK@0.10", "ci95": {"PCK@0.10": (0.1, 0.2)}}
    results = [
        make_result(key=str(seed), seed=seed, metrics={"PCK@0.10": value}, per_class=classes, **common)
        for (seed, value, _), classes in zip(scores, per_class, strict=True)
    ]
    (both,) = content(results)["results"]
    assert (both["value"], both["low"], both["classes"], both["own"]["seeds"]) == (124, 74, [300, None], [0, 1])
    failed = make_result(key="f", seed=2, status="failed", primary_metric="PCK@0.10")
    (one,) = content([failed, results[0]])["results"]
    assert (one["value"], one["low"], one["high"]) == (123, 100, 200)  # 12.3 %, as the tables print 0.1235
    assert (one["classes"], one["own"]["seeds"]) == ([200, None], [0])


def drive(page: str, script: str, folder: Path, width: int = 1200) -> dict:
    """What `script` returns in the page, and `wrong`: errors on its console."""
    end = f"""
    <script>
    const out = (() => {{ {script} }})();
    out.wrong = wrong;
    const shown = Object.assign(document.createElement("pre"), {{ id: "out", textContent: JSON.stringify(out) }});
    document.body.replaceChildren(shown);
    </script></body>"""
    file = folder / "page.html"
    file.write_text(page.replace("<head>", "<head>" + DRIVER).replace("</body>", end), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/user"]
    command += [f"--window-size={width},900", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


FIRST = "const first = n => [...document.querySelectorAll('section')][n].querySelector('tbody td').textContent;"


@in_browser
def test_sort_filter_open_and_dark(make_result: Callable[..., Result], tmp_path: Path) -> None:
    script = (
        FIRST
        + """
        const before = [first(0), first(1)];
        document.querySelectorAll('section')[0].querySelectorAll('th button')[1].click();
        const down = first(0);
        document.querySelectorAll('section')[0].querySelectorAll('th button')[1].click();
        const up = first(0);
        const set = (id, value, event) => {
          const changed = document.getElementById(id);
          changed.value = value;
          changed.dispatchEvent(new Event(event));
        };
        set('family', 'linear_segmentation', 'change');
        const families = [...document.querySelectorAll('h2')].map(h => h.textContent);
        set('family', '', 'change');
        set('search', 'MODEL-1', 'input');
        const searched = [...document.querySelectorAll('tbody tr')].length;
        set('search', 'no such', 'input');
        const nothing = document.getElementById('main').textContent;
        set('search', '', 'input');
        const paper = () => getComputedStyle(document.body).backgroundColor;
        const light = paper();
        document.getElementById('theme').click();
        const dark = paper();
        location.hash = '#model-2'; show();
        set('base', 'model-0', 'change');
        const beside = [...document.querySelectorAll('tbody tr')].map(r => r.lastElementChild.textContent);
        const details = document.querySelector('details');
        details.open = true;
        details.dispatchEvent(new Event('toggle'));
        const bars = details.querySelectorAll('rect').length, shown = details.textContent;
        return { before, down, up, families, searched, nothing, light, dark, beside, bars, shown };
        """
    )
    out = drive(report_page(board(make_result)), script, tmp_path)
    assert out["wrong"] == []
    assert out["before"] == ["model-0", "model-2"]  # each table has its own best first
    assert (out["down"], out["up"]) == ("model-0", "model-2")
    assert out["families"] == ["linear segmentation", "Plots"]
    assert out["searched"] == 2
    assert out["nothing"] == "Nothing fits these filters."
    assert out["light"] != out["dark"]
    assert [cell[:3] for cell in sorted(out["beside"])] == ["+33", "-33"]
    assert out["bars"] == 3
    assert '"cpu": "one"' in out["shown"]
    assert "00000002" in out["shown"]


@in_browser
def test_a_narrow_screen_scrolls_only_the_tables(make_result: Callable[..., Result], tmp_path: Path) -> None:
    script = "return { page: document.documentElement.scrollWidth, window: innerWidth };"
    out = drive(report_page(board(make_result, models=4, tasks=12)), script, tmp_path, width=500)
    assert out["wrong"] == []
    assert out["page"] <= out["window"]


@in_browser
def test_names_are_text_and_never_markup(make_result: Callable[..., Result], tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=wrong.push(1)>"
    page = report_page([make_result(model=evil)])
    assert evil not in page
    out = drive(page, "return { name: document.querySelector('tbody td').textContent };", tmp_path)
    assert (out["name"], out["wrong"]) == (evil, [])


def test_the_page_of_pictures_escapes_every_value() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    picture = {"title": evil, "file": "a.png", "small": "a-small.png", "width": 1, "height": 1}
    rows = [({"name": evil, "caption": evil}, [picture])]
    page = render("show.html", title=evil, value=evil, note=evil, legend=[(evil, (1, 2, 3))], rows=rows)
    assert page.count("<img") == 1
    assert page.count(html.escape(evil).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) == 10
    assert "background:rgb(1, 2, 3)" in page


def test_a_large_page_stays_small_and_bytes_are_the_same(make_result: Callable[..., Result]) -> None:
    results = board(make_result, models=200, tasks=40, classes=40)
    page = report_page(results)
    assert len(page.encode()) < 5_000_000
    assert page == report_page(reversed(results))


@pytest.mark.parametrize("intervals", [False, True])
def test_latex_marks_the_best_and_compiles(intervals: bool, make_result: Callable[..., Result], tmp_path: Path) -> None:
    results = [*board(make_result), make_result(0.7, key="e" * 16, model="50%_$&#{x}~^\\", task="data0_ic")]
    write_leaderboard(results, tmp_path, latex_intervals=intervals)
    text = (tmp_path / "in_context.tex").read_text()
    beside = r" {\scriptsize [69.0, 72.0]}" if intervals else ""
    assert rf"model-0 & \textbf{{70.0}}{beside} \\" in text
    assert (
        rf"50\%\_\$\&\#\{{x\}}\textasciitilde{{}}\textasciicircum{{}}\textbackslash{{}} & \textbf{{70.0}}{beside}"
        in text
    )
    assert r"\underline{53.3}" in text
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex is installed: the table was not compiled")
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + text + "\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]

"""The report page in a real browser: what is clicked does what it says, and nothing goes wrong on the way."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neco_bench.reports.extras import curves_of, picture_folder, picture_links
from neco_bench.reports.leaderboard import write_leaderboard
from neco_bench.reports.published import Published
from neco_bench.reports.render import render
from neco_bench.reports.report import report_page
from neco_bench.reports.survey import survey_page
from neco_bench.results.schema import Result
from neco_bench.results.store import ResultStore
from tests.command import neco

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


def content(results: list[Result], **options: Any) -> dict:
    page = report_page(results, **options)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
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


FIRST = "const first = n => document.querySelectorAll('.board')[n].querySelector('tbody td').textContent;"
SET = """
    const set = (id, value, event) => {
      const changed = document.getElementById(id);
      changed.value = value;
      changed.dispatchEvent(new Event(event));
    };
"""


@pytest.mark.slow
@in_browser
def test_sort_filter_open_and_dark(make_result: Callable[..., Result], tmp_path: Path) -> None:
    script = (
        FIRST
        + SET
        + """
        const before = [first(0), first(1)];
        document.querySelector('.board').querySelectorAll('th button')[1].click();
        const down = first(0);
        document.querySelector('.board').querySelectorAll('th button')[1].click();
        const up = first(0), said = document.querySelector('.board th[aria-sort]').ariaSort;
        set('family', 'linear_segmentation', 'change');
        const families = [...document.querySelectorAll('.board h3')].map(h => h.textContent);
        set('family', '', 'change');
        set('search', 'MODEL-1', 'input');
        const searched = [...document.querySelectorAll('.board tbody tr')].length;
        set('search', 'no such', 'input');
        const nothing = document.getElementById('main').textContent;
        set('search', '', 'input');
        const paper = () => getComputedStyle(document.body).backgroundColor;
        const light = paper();
        document.getElementById('theme').click();
        const dark = paper();
        set('base', 'model-0', 'change');
        location.hash = '#model-2'; show();
        const beside = [...document.querySelectorAll('tbody tr')].map(r => r.lastElementChild.textContent);
        const details = document.querySelector('#main details');
        details.open = true;
        details.dispatchEvent(new Event('toggle'));
        const dots = details.querySelectorAll('[aria-label=dot] path, [aria-label=dot] circle').length;
        const shown = details.textContent;
        return { before, down, up, said, families, searched, nothing, light, dark, beside, dots, shown };
        """
    )
    out = drive(report_page(board(make_result)), script, tmp_path)
    assert out["wrong"] == []
    assert out["before"] == ["model-0", "model-2"]  # each table has its own best first
    assert (out["down"], out["up"], out["said"]) == ("model-0", "model-2", "ascending")
    assert out["families"] == ["linear segmentation"]
    assert out["searched"] == 2
    assert out["nothing"] == "No results match these filters."
    assert out["light"] != out["dark"]
    assert [cell[:3] for cell in sorted(out["beside"])] == ["+33", "-33"]
    assert sorted(cell.split()[-1] for cell in out["beside"]) == ["better", "worse"]
    assert out["dots"] == 6  # the classes of the model, and of the base
    assert '"cpu": "one"' in out["shown"]
    assert "00000002" in out["shown"]


@pytest.mark.slow
@in_browser
def test_every_section_is_drawn_and_filters_move_no_mark(make_result: Callable[..., Result], tmp_path: Path) -> None:
    """model-0 is first alone in task 0, by tests; the other two of task 2 are tied, and so not bold."""
    script = (
        SET
        + """
        drawAll();
        const best = () => [...document.querySelectorAll('#section-tables .best')].map(c => c.textContent.slice(0, 4));
        const all = best(), may = document.querySelectorAll('#section-tables .may').length;
        const sections = [...document.querySelectorAll('section')].map(s => s.id.slice(8));
        const empty = [...document.querySelectorAll('.plot')].filter(p => !p.querySelector('svg')).length;
        const whiskers = document.querySelectorAll('#section-classes [aria-label=rule] line').length;
        const front = [...document.querySelectorAll('#section-throughput td:nth-child(2)')].map(c => c.textContent);
        const grey = [...document.querySelectorAll('tr.paper td')].map(c => c.textContent);
        const beside = document.querySelector('#section-tables .board td .paper').textContent;
        const badges = [...document.querySelectorAll('.badge')].slice(0, 3).map(b => b.textContent);
        const link = document.querySelector('a.badge').getAttribute('href');
        const lines = document.querySelectorAll('#section-curves [aria-label=line] path').length;
        const names = [...document.querySelectorAll('#nav button')].length;
        set('search', 'model-1', 'input');
        const filtered = best();
        set('search', '', 'input');
        set('base', 'model-1', 'change');
        drawAll();
        const states = document.querySelectorAll('#section-differences .panels figure').length;
        return { all, may, sections, empty, whiskers, front, grey, beside, badges, link, lines, names, filtered,
                 states };
        """
    )
    results = board(make_result)
    results[0].provenance.update(features={"tokens": 784}, training={"contamination": "seen"})
    for m in (0, 1):
        facts = {"weights_id": f"{m:064x}", "protocol_hash": "b" * 64}
        wide = {"miou": (0.4, 0.6)}
        results.append(make_result(0.5, key=f"tie{m}", model=f"model-{m}", task="tied_ic", ci95=wide, provenance=facts))
    for m, (images, size) in enumerate([(50.0, 224), (90.0, 224), (20.0, 224)]):
        results.append(
            make_result(
                key=f"speed{m}",
                model=f"model-{m}",
                task=f"speed_{size}_fp32",
                family="speed",
                protocol="speed-1",
                primary_metric="images_per_second",
                metrics={"images_per_second": images, "gflops_per_image": 2.0, "million_parameters": 1.0},
                ci95={},
                provenance={"weights_id": f"{m:064x}", "features": {"used_size": size}, "precision": "fp32"},
            )
        )
    fields: dict[str, Any] = {
        "arch": "ViT",
        "task": "data0_ic",
        "protocol": "hbird-2",
        "metric": "miou",
        "setting": "s",
        "source": "p",
    }
    papers = [
        Published(**fields, model=name, value=Decimal("61.5"), quality="printed") for name in ("model-0", "elsewhere")
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("step,loss\n" + "".join(f"{i},{1 / i}\n" for i in range(1, 500)))
    (tmp_path / "run" / "eval.csv").write_text("step,task,metric,value,low,high\n9,a,miou,0.2,,\n19,a,miou,0.3,,\n")
    made = curves_of([tmp_path / "run"])
    assert [(c["value"], len(c["points"])) for c in made] == [("loss", 200), ("a miou", 2)]
    assert made[0]["points"][0] == [2.0, pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=1e-5)]
    page = report_page(results, papers, pictures={results[0].key: "../pictures/a/index.html"}, curves=made)
    out = drive(page, script, tmp_path)
    assert out["wrong"] == []
    assert out["sections"] == ["ranking", "heat", "tables", "throughput", "classes", "curves"]
    assert out["names"] == 6
    assert out["empty"] == 0
    assert out["all"] == ["70.0", "53.3"]  # the best of each family; model-2 has 53.3 in the second
    assert out["may"] == 2  # a tie: in colour, but not bold
    assert out["filtered"] == []  # what is left is not best, now that the best is hidden
    assert out["front"] == ["yes", "yes", ""]
    assert out["grey"][0] == "elsewhere (published)"
    assert (out["beside"], out["badges"]) == (" published 61.5", ["overlap: seen", "784 tok.", "pictures"])
    assert out["link"] == "../pictures/a/index.html"
    assert (out["lines"], out["states"]) == (4, 3)  # two curves, and their keys


@pytest.mark.slow
@in_browser
def test_the_page_of_published_numbers(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=wrong.push(1)>"
    fields: dict[str, Any] = {
        "arch": "ViT-S/16",
        "task": "",
        "protocol": "paper:x",
        "metric": "mIoU",
        "quality": "printed",
    }
    rows = [
        Published(**fields, model=name, value=Decimal(value), setting=f"{evil}: {number}", source=evil)
        for number, (name, value) in enumerate([(evil, "61.50"), ("b", "7.0"), ("b", "8")])
    ]
    rows.append(
        Published(
            **(fields | {"task": "nyu_depth", "metric": "rmse"}),
            model="b",
            value=Decimal("0.31"),
            setting="",
            source="y",
        )
    )
    page = survey_page(rows)
    assert evil not in page
    script = "drawAll(); return { cells: [...document.querySelectorAll('.board td')].map(c => c.textContent) };"
    out = drive(page, script, tmp_path)
    assert out["wrong"] == []
    assert {f"{evil}, ViT-S/16", "61.50", "7.0", "8", "0.31"} <= set(out["cells"])


def test_classes_have_the_intervals_of_their_counts(make_result: Callable[..., Result]) -> None:
    counts = np.random.default_rng(0).integers(1, 50, (30, 2, 2))
    total = counts.sum(0)
    iou = {f"c{i}": float(total[i, i] / (total[i].sum() + total[:, i].sum() - total[i, i])) for i in range(2)}
    arrays = {"confusion": counts, "image_id": np.array([str(i) for i in range(30)])}
    settings = {"settings": {"absent": "exclude"}, "weights_id": "a" * 64}
    result = make_result(sum(iou.values()) / 2, per_class={"IoU": iou}, provenance=settings)
    (row,) = content([result], statistics=lambda _: arrays)["results"]
    for value, low, high, own in zip(row["classes"], *row["class_ends"], iou.values(), strict=True):
        assert low < value < high
        assert value == round(1000 * own)
    other = result.model_copy(update={"per_class": {"IoU": {"c0": 0.9, "c1": 0.9}}})  # not those of the counts
    (row,) = content([other], statistics=lambda _: arrays)["results"]
    assert "class_ends" not in row


def test_links_lead_to_pictures_that_are_there(make_result: Callable[..., Result], tmp_path: Path) -> None:
    results = [make_result(), make_result(key="f" * 16, model="x")]
    page = picture_folder(results[0], tmp_path / "a b") / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("")
    links = picture_links(results, tmp_path / "a b", tmp_path / "out")
    assert links == {results[0].key: "../a%20b/dino_vits16/camvid_ic-hbird-2-01234567/index.html"}


def test_the_command_takes_pictures_runs_and_papers(make_result: Callable[..., Result], tmp_path: Path) -> None:
    store, out = ResultStore(tmp_path / "results"), tmp_path / "board"
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    for number, model in enumerate(("a", str(run))):
        store.save(make_result(0.4 + number / 10, key=f"{number:016x}", model=model))
    shown = picture_folder(store.load_all()[0], tmp_path / "shown")
    shown.mkdir(parents=True)
    (shown / "index.html").write_text("")
    base = ("leaderboard", "--results", store.folder, "--out", out)
    code, printed, err = neco(*base, "--pictures", tmp_path / "shown")
    assert (code, "in context: ranking" in printed, err.count("wrote")) == (0, True, 1), err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "../shown/" in page
    assert '"points":[[1.0,0.5],[2.0,0.25]]' in page  # the run folder is a model of a result
    code, _, err = neco(*base, "--run-folder", tmp_path / "nowhere")
    assert (code, "--run-folder" in err) == (3, True)
    code, printed, _ = neco("leaderboard", "--published-only", "--out", out, "--json")
    assert (code, json.loads(printed)["published"] > 800) == (0, True)
    assert (out / "published.html").stat().st_size > 500_000


@pytest.mark.slow
@in_browser
def test_a_narrow_screen_scrolls_only_the_tables(make_result: Callable[..., Result], tmp_path: Path) -> None:
    script = "return { page: document.documentElement.scrollWidth, window: innerWidth };"
    out = drive(report_page(board(make_result, models=4, tasks=12)), script, tmp_path, width=500)
    assert out["wrong"] == []
    assert out["page"] <= out["window"]


@pytest.mark.slow
@in_browser
def test_names_are_text_and_never_markup(make_result: Callable[..., Result], tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=wrong.push(1)>"
    classes = {"IoU": {evil: 0.5}}
    common = {"task": evil, "family": evil, "per_class": classes, "provenance": {"training": {"contamination": evil}}}
    page = report_page([make_result(model=evil, **common), make_result(model=evil + "2", key="2", **common)])
    assert evil not in page
    out = drive(page, "drawAll(); return { name: document.querySelector('.board tbody td').textContent };", tmp_path)
    assert (out["name"], out["wrong"]) == (evil, [])


def test_the_page_of_pictures_escapes_every_value() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    picture = {"title": evil, "file": "a.png", "small": "a-small.png", "width": 1, "height": 1}
    rows = [({"name": evil, "caption": evil}, [picture])]
    page = render("show.html", title=evil, value=evil, note=evil, legend=[(evil, (1, 2, 3))], rows=rows)
    assert page.count("<img") == 1
    assert page.count(html.escape(evil).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")) == 10
    assert "background:rgb(1, 2, 3)" in page


@pytest.mark.slow
def test_a_large_page_stays_small_and_bytes_are_the_same(make_result: Callable[..., Result]) -> None:
    assert len(report_page(board(make_result, models=200, tasks=40, classes=40)).encode()) < 5_000_000
    results = board(make_result, models=20, tasks=8, classes=8)
    assert report_page(results) == report_page(reversed(results))


@pytest.mark.parametrize("intervals", [False, True])
def test_latex_marks_the_best_and_compiles(intervals: bool, make_result: Callable[..., Result], tmp_path: Path) -> None:
    """Ties are not bold: what tests do not tell apart is not marked."""
    results = [*board(make_result), make_result(0.7, key="e" * 16, model="50%_$&#{x}~^\\", task="data0_ic")]
    write_leaderboard(board(make_result), tmp_path / "alone", latex_intervals=intervals)
    write_leaderboard(results, tmp_path, latex_intervals=intervals)
    alone, text = ((folder / "in_context.tex").read_text() for folder in (tmp_path / "alone", tmp_path))
    beside = r" {\scriptsize [69.0, 72.0]}" if intervals else ""
    assert rf"model-0 & \textbf{{70.0}}{beside} \\" in alone
    assert r"\underline{53.3}" in alone
    assert rf"model-0 & 70.0{beside} \\" in text
    assert rf"50\%\_\$\&\#\{{x\}}\textasciitilde{{}}\textasciicircum{{}}\textbackslash{{}} & 70.0{beside}" in text
    assert r"\textbf" not in text
    assert r"\underline" not in text  # the third is neither first nor second
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex is installed: the table was not compiled")
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + text + "\\end{document}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]

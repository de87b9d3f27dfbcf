import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mmrec_train.errors import UserError
from mmrec_train.monitoring import Record, write_report
from mmrec_train.monitoring.metrics_file import encode
from mmrec_train.monitoring.report import PLOTS


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.sections: dict[str, list[str]] = {}  # id of a section -> the tags in it
        self.texts: dict[str, str] = {}  # id of a section -> its text
        self._section = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.sections[self._section], self.texts[self._section] = [], ""
        elif self._section:
            self.sections[self._section].append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.texts[self._section] += data


FULL: list[Record] = [
    {
        "step": step,
        "tokens": step * 8192,
        "loss": 2 + 8 * 0.97**step,
        "learning_rate": 1e-3,
        "grad_norm": 1.0 / step,
        "grad_norm_memory": 0.0,
        "grad_norm_decay": 0.1,
        "grad_norm_gate": 0.2,
        "tokens_per_second": 1e5,
        "step_seconds": 0.08,
        "data_wait_seconds": 1e-4,
        "mfu": 0.4,
        "peak_memory_bytes": 2**33,
        "solver_iterations": 5,
        "solver_residual": 1e-5,
        "skipped": 0,
    }
    for step in range(1, 101)
]
VALIDATION: list[Record] = [{"step": step, "validation_loss": 9.0 - step / 20} for step in (0, 50, 100)]
PLOT_IDS = [f"plot-{plot.name}" for plot in PLOTS]


def report(run_dir: Path, records: list[Record]) -> tuple[str, Page]:
    (run_dir / "metrics.jsonl").write_text("".join(encode(record) + "\n" for record in records))
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text()
    return html, Page(html)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """The report of a run that recorded everything."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "config.yaml").write_text("model:\n  preset: tiny\n")
    (run_dir / "sample.txt").write_bytes(b"<script>alert(1)</script> & \xff more")
    return report(run_dir, FULL + VALIDATION)


def test_all_plots_are_drawn(full: tuple[str, Page]) -> None:
    _, page = full
    assert [name for name in page.sections if name.startswith("plot-")] == PLOT_IDS
    assert {name: page.sections[name].count("svg") for name in PLOT_IDS} == dict.fromkeys(PLOT_IDS, 1)
    assert set(PLOT_IDS) == {
        "plot-loss",
        "plot-learning-rate",
        "plot-grad-norm",
        "plot-tokens-per-second",
        "plot-data-wait",
        "plot-mfu",
        "plot-memory",
        "plot-solver-iterations",
        "plot-solver-residual",
    }
    for word in ("training", "validation", "nats per token"):
        assert word in page.texts["plot-loss"]
    for word in ("all", "memory", "decay", "gate"):
        assert word in page.texts["plot-grad-norm"]


def test_the_page_needs_nothing_beside_itself(full: tuple[str, Page]) -> None:
    html, page = full
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "data", "action")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"https?:|@import|<!ENTITY", html)
    assert set(re.findall(r"url\((.)", html)) == {"#"}


def test_ids_are_unique_and_references_reach_them(full: tuple[str, Page]) -> None:
    html, page = full
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert references
    assert set(references) <= set(ids)


def test_colours_follow_the_page_light_or_dark(full: tuple[str, Page]) -> None:
    html, _ = full
    assert "prefers-color-scheme: dark" in html
    body = html[html.index("<body>") :]
    assert not re.findall(r"#[0-9a-f]{6}\b(?!-)", re.sub(r'(id="|href="#|url\(#)[^")]*', "", body))
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html))
    assert used >= {"--series-1", "--series-2", "--series-3", "--series-4", "--grid", "--ink-soft"}
    assert all(html.count(f"{name}: #") == 2 for name in used)


def test_summary_config_and_sample_are_shown_as_text(full: tuple[str, Page]) -> None:
    html, page = full
    assert "model:\n  preset: tiny\n" in page.texts["config"]
    assert "<script>alert(1)</script> & \ufffd more" in page.texts["sample"]
    assert "script" not in page.tags
    assert "<dt>training loss</dt><dd>9.7600 → 2.3804</dd>" in html
    assert "<dt>MFU</dt><dd>40.0%</dd>" in html


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "validation_loss": 9.0}],
        [{"step": 1, "loss": 9.0}],
        [
            {"step": 1, "loss": 9.0, "mfu": None, "solver_residual": 0.0, "grad_norm": 0.0},
            {"step": 2, "loss": 8.0},
        ],
        [{"step": 1, "loss": math.nan, "grad_norm": math.inf}],
    ],
)
def test_few_points_and_missing_keys_still_make_a_report(tmp_path: Path, records: list[Record]) -> None:
    _, page = report(tmp_path, records)
    drawn = {name for name in PLOT_IDS if "svg" in page.sections[name]}
    finite = {
        key
        for record in records
        for key, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    expected = {f"plot-{plot.name}" for plot in PLOTS if any(series.key in finite for series in plot.series)}
    assert drawn == expected
    for name in set(PLOT_IDS) - drawn:
        assert "no numbers were recorded" in page.texts[name]


def test_validation_sets_are_a_table_of_the_last_validation(tmp_path: Path) -> None:
    early: Record = {"step": 0, "validation/code/loss": 9.0}
    last: Record = {
        "step": 50,
        "validation_loss": 2.0,
        "validation/code/loss": 1.5,
        "validation/code/perplexity": 4.4817,
        "validation/code/loss_0-1K": 1.75,
        "validation/code/loss_100K+": 1.25,
        "validation/a<b/loss": math.nan,
        "validation/a<b/perplexity": math.nan,
        "validation/a<b/loss_8-32K": 2.5,
        "validation/a<b/loss_0-1K": 2.25,
    }
    _, page = report(tmp_path, [early, last, {"step": 60, "loss": 1.0}])
    table = [line.split() for line in page.texts["validation"].splitlines() if line]
    assert table == [
        ["Validation", "sets", "after", "step", "50,", "loss", "by", "position", "in", "the", "document"],
        ["setlossperplexity0-1K8-32K100K+"],
        ["code1.50004.48171.7500–1.2500"],
        ["a<bnannan2.25002.5000–"],
    ]
    assert page.sections["validation"].count("tr") == 3
    assert page.sections["validation"].count("td") == 12


def test_without_a_validation_there_is_no_table(tmp_path: Path) -> None:
    _, page = report(tmp_path, FULL[:2])
    assert "validation" not in page.sections


def test_numbers_that_are_not_finite_are_told(tmp_path: Path, full: tuple[str, Page]) -> None:
    assert "not finite" not in full[0]
    bad: list[Record] = [
        {"step": 101, "loss": math.nan},
        {"step": 102, "loss": math.nan, "grad_norm": math.inf},
    ]
    html, page = report(tmp_path, FULL[:2] + bad)
    assert "2 records with a number that is not finite" in html
    assert "svg" in page.sections["plot-loss"]


def test_a_lone_point_is_visible(tmp_path: Path) -> None:
    html, _ = report(tmp_path, [{"step": 1, "loss": 9.0}])
    assert re.search(r'<use href="#loss-m[0-9a-f]+"[^>]*style="fill: var\(--series-1\)', html)


def test_a_folder_that_is_no_run_is_a_plain_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []

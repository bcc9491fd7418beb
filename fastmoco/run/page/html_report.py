"""One self-contained HTML page about one run, or several beside each other.

It stands on `metrics.jsonl` and `config.yaml` alone, so it can be written while a run trains:
curves as inline SVG, no script, no network, light and dark and print.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastmoco.config import ConfigError, load
from fastmoco.data.page import document, picture, words, write_page
from fastmoco.run.alarms import Alarm, Watch
from fastmoco.run.page.svg_plot import Level, Line, level_swatch, number, plot, swatch
from fastmoco.run.record import (
    METRICS,
    WARMUP_STEPS,
    Record,
    knn_summary,
    read_metrics,
    series,
    train_summary,
)

NAME = "report.html"
STYLE = """
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:20px}
svg.plot{display:block;width:100%;height:auto}
svg text{fill:var(--faint);font-size:11px;font-family:inherit}
svg path{fill:none}
.grid{stroke:var(--line)}
.level path,path.level{stroke:var(--faint);stroke-width:1.3}
.curve,.swatch path{stroke-width:2;stroke-linejoin:round}
.hollow{fill:var(--paper)}
.c0{stroke:var(--c0);fill:var(--c0)}.c1{stroke:var(--c1);fill:var(--c1)}
.c2{stroke:var(--c2);fill:var(--c2)}.c3{stroke:var(--c3);fill:var(--c3)}
.c4{stroke:var(--c4);fill:var(--c4)}.c5{stroke:var(--c5);fill:var(--c5)}
.swatch{width:34px;height:12px;margin-right:6px;vertical-align:-1px;flex:none}
.legend{list-style:none;margin:.3em 0 0;padding:0;font-size:13px}
.legend li{overflow-wrap:anywhere}
@media print{.panels{grid-template-columns:1fr 1fr;gap:12px}}
"""


@dataclass(frozen=True)
class Curve:
    """A metric of the records: kind of record, name, words for the legend and a factor."""

    kind: str
    name: str
    label: str
    scale: float = 1


@dataclass(frozen=True)
class Panel:
    """One question and the curves that answer it; with several runs only the first of them."""

    title: str
    curves: tuple[Curve, ...]
    low: float | None = None
    high: float | None = None
    note: str = ""


PANELS = (
    Panel("Loss (InfoNCE)", (Curve("train", "loss", "training loss"),)),
    Panel(
        "Pretext accuracy (%)",
        (
            Curve("train", "pretext_top1", "key found", 100),
            Curve("train", "pretext_top5", "key among the first five", 100),
        ),
        low=0,
        high=100,
    ),
    Panel(
        "kNN accuracy on held-out images (%)",
        (Curve("knn", "knn_top1", "trained encoder", 100),),
        low=0,
    ),
    Panel(
        "Effective rank of the features (RankMe)",
        (
            Curve("train", "effective_rank_q", "queries"),
            Curve("train", "effective_rank_k", "keys"),
        ),
        low=1,
        note="How many directions features use; it falls in the first steps of any run.",
    ),
    Panel(
        "Uniformity of the features",
        (Curve("train", "uniformity_q", "queries"), Curve("train", "uniformity_k", "keys")),
        high=0,
        note="Lower is more spread; 0 is one point.",
    ),
    Panel(
        "Alignment of positive pairs",
        (Curve("train", "alignment", "squared distance of query and key"),),
        low=0,
        note="Lower is closer; it counts only together with the uniformity.",
    ),
    Panel(
        "Standard deviation per dimension",
        (Curve("train", "std_q", "queries"), Curve("train", "std_k", "keys")),
        low=0,
    ),
    Panel("Learning rate", (Curve("train", "lr", "learning rate"),), low=0),
    Panel("Image pairs per second", (Curve("train", "images_per_second", "images/s"),), low=0),
    Panel(
        "Time spent waiting for data (%)",
        (Curve("train", "data_wait_percent", "data wait"),),
        low=0,
        high=100,
    ),
    Panel("Peak memory (GiB)", (Curve("train", "peak_memory_gib", "memory"),), low=0),
    Panel(
        "GPU utilization (%)",
        (Curve("train", "gpu_utilization_percent", "GPU of rank 0"),),
        low=0,
        high=100,
        note="One reading of NVML per point.",
    ),
    Panel(
        "GPU power (W)",
        (Curve("train", "power_w", "GPU of rank 0"),),
        low=0,
        note="One reading of NVML per point.",
    ),
)


@dataclass(frozen=True)
class RunRecords:
    """A run as the page knows it."""

    folder: Path
    name: str
    records: list[Record]


def read_run(folder: Path, name: str = "") -> RunRecords:
    """Raises `ConfigError` where the folder holds no run."""
    records = read_metrics(folder / METRICS)
    return RunRecords(folder, name or folder.resolve().name, records)


def name_apart(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other; numbered where none do."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}: {folder.name}" for i, folder in enumerate(folders, 1)]


Picture = tuple[str, str, bytes]
"""Title, caption and PNG."""


def write_report(folders: Sequence[Path], out: Path, pictures: Sequence[Picture] = ()) -> None:
    """Write the page about these runs to `out`, with pictures behind the curves.

    The file appears whole, whoever reads it. Raises `ConfigError` for a folder without a run and
    where `out` cannot be written.
    """
    names = name_apart(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    write_page(out, page(runs, pictures))


def page(runs: Sequence[RunRecords], pictures: Sequence[Picture] = ()) -> str:
    """The whole HTML text."""
    *others, last = (run.name for run in runs)
    title = f"{', '.join(others)} and {last}" if others else last
    body = [f"<h1>{escape(title)}</h1>"]
    body += [_sentences(run, index, len(runs) > 1) for index, run in enumerate(runs)]
    body += [_alarms(runs)]
    figures = [figure for panel in PANELS if (figure := _figure(panel, runs))]
    body += ['<h2>Curves over epochs</h2><div class="panels">', *figures, "</div>"]
    body += [_pictures(pictures)] if pictures else []
    body += [_configuration(run) for run in runs]
    return document(title, "fastmoco report", "".join(body), STYLE)


def _pictures(pictures: Sequence[Picture]) -> str:
    figures = [picture(title, caption, "png", png) for title, caption, png in pictures]
    heading = "<h2>What the encoder holds to be alike</h2>"
    return f'{heading}<div class="pictures">{"".join(figures)}</div>'


def _sentences(run: RunRecords, index: int, several: bool) -> str:
    metrics = run.folder / METRICS
    look = f"{swatch(index)} <b>{escape(run.name)}</b><br>" if several else ""
    lines = [train_summary(metrics), knn_summary(metrics)]
    return f'<p class="summary">{look}{"<br>".join(map(words, lines))}</p>'


def _alarms(runs: Sequence[RunRecords]) -> str:
    """What was warned of, each kind of alarm once per run with the epochs at which it showed."""
    items = []
    for run in runs:
        found: dict[str, tuple[str, float, float]] = {}
        for epoch, alarm in _alarms_of(run):
            first = found.get(alarm.kind, (alarm.sentence, epoch, epoch))
            found[alarm.kind] = (first[0], first[1], epoch)
        who = f"{run.name}, " if len(runs) > 1 else ""
        items += [
            f"<li><b>{escape(who)}epoch {first:.2f} to {last:.2f}</b>: {words(sentence)}</li>"
            for sentence, first, last in found.values()
        ]
    if not items:
        return '<p class="calm">No alarm.</p>'
    return f'<section class="alarms"><h2>Alarms</h2><ul>{"".join(items)}</ul></section>'


def _alarms_of(run: RunRecords) -> list[tuple[float, Alarm]]:
    """Every alarm with its epoch, told again from the records and `config.yaml`."""
    try:
        watch = Watch(load(run.folder / "config.yaml"))
    except (OSError, ConfigError):
        return []
    return [(record.epoch, alarm) for record in run.records for alarm in watch.see(record)]


def _figure(panel: Panel, runs: Sequence[RunRecords]) -> str:
    """The panel as `<figure>`, empty where no run recorded it."""
    several = len(runs) > 1
    lines, legend = [], []
    for index, run in enumerate(runs):
        for place, curve in enumerate(panel.curves[: 1 if several else None]):
            epochs, values = series(run.records, curve.kind, curve.name)
            if not epochs:
                continue
            style, label = (index, run.name) if several else (place, curve.label)
            values = [value * curve.scale for value in values]
            lines.append(Line(label, epochs, values, style))
            legend.append(f"<li>{swatch(style)}{escape(label)} <b>{number(values[-1])}</b></li>")
    levels = _levels(panel, runs)
    if not lines:
        return ""
    legend += [
        f"<li>{level_swatch(level.style)}{escape(level.label)} <b>{number(level.y)}</b></li>"
        for level in levels
    ]
    note = f"<p>{escape(panel.note)}</p>" if panel.note else ""
    drawn = plot(panel.title, lines, levels, low=panel.low, high=panel.high)
    return (
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{drawn}"
        f'<ul class="legend">{"".join(legend)}</ul>{note}</figure>'
    )


def _levels(panel: Panel, runs: Sequence[RunRecords]) -> list[Level]:
    """What a panel's curves are compared with; of several runs only what they have in common."""
    found = [_levels_of(panel, run) for run in runs]
    return [level for level in found[0] if all(level in other for other in found)]


def _levels_of(panel: Panel, run: RunRecords) -> list[Level]:
    name = panel.curves[0].name
    if name == "loss":
        guess = series(run.records, "train", "loss_random")[1]
        return [Level("ln(1 + K), a random guess", guess[-1])] if guess else []
    if name == "std_q":
        even = series(run.records, "train", "std_even")[1]
        return [Level("spread evenly, 1/√C", even[-1])] if even else []
    if name == "effective_rank_q":
        first = [r for r in run.records if r.step <= WARMUP_STEPS and name in r.values][-1:]
        return [Level("untrained encoder", r.values[name]) for r in first]
    if name == "knn_top1":
        marks = [r.values for r in run.records if r.kind == "knn_baseline"][-1:]
        words = (("untrained", "untrained encoder"), ("raw_pixel", "raw pixels"))
        return [
            Level(label, 100 * mark[key], style)
            for mark in marks
            for style, (key, label) in enumerate((*words, ("chance", "chance")))
            if key in mark
        ]
    return []


def _configuration(run: RunRecords) -> str:
    try:
        text = (run.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return (
        f"<details><summary>Configuration of {escape(run.name)}</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )

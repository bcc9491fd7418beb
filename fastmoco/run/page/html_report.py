"""One self-contained HTML page about one run, or several beside each other.

It stands on `metrics.jsonl` and `config.yaml` alone, so it can be written while a run trains:
curves as inline SVG, no script, no network, light and dark and print.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastmoco.config import ConfigError, load
from fastmoco.machine import durable
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
# Six colours that stay apart for colour-blind readers (Okabe and Ito), darkened for white paper.
STYLE = """
:root{--paper:#fff;--ink:#23272e;--faint:#626a76;--line:#e3e6ea;--warn:#fdf1e3;--warn-ink:#8a4b00;
--c0:#1f5fbf;--c1:#b45309;--c2:#0f7b5f;--c3:#a03a86;--c4:#5b6470;--c5:#8a7000;
color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--paper:#16181c;--ink:#e6e9ee;--faint:#9aa3b0;
--line:#31353c;--warn:#33260f;--warn-ink:#f4bf75;--c0:#7aaef5;--c1:#f2a65a;--c2:#56c9a6;
--c3:#e08fc9;--c4:#aab3bf;--c5:#d9c255}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:16px}
h1{font-size:1.5rem;margin:.3em 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:1.6em 0 .6em}
.summary{margin:.6em 0;overflow-wrap:anywhere}
.calm{color:var(--faint)}
.alarms{background:var(--warn);color:var(--warn-ink);padding:.4em 1em;border-radius:6px}
.alarms h2{margin:.3em 0}
.alarms ul{margin:.3em 0;padding-left:1.2em}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:20px}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:20px}
.pictures img{max-width:100%;height:auto;background:#fff}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-weight:600}
figure p{margin:.2em 0;color:var(--faint);font-size:13px}
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
details{margin:1.4em 0}
pre{overflow-x:auto;font-size:12px}
@media print{main{max-width:none;padding:0}.panels{grid-template-columns:1fr 1fr;gap:12px}
body{font-size:11pt}details{display:none}h2,figcaption{break-after:avoid}
.pictures{display:block}.pictures figure{margin-bottom:5mm}.pictures img{max-height:210mm}}
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
    text = page(runs, pictures)
    try:
        durable.replace(out, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot write the report {out}: {error}.") from error


def _words(text: str) -> str:
    """Text for the page, in which a number and its percent sign stay on one line."""
    return escape(text).replace(" %", "\u00a0%")


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
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or a browser asks for /favicon.ico
        f"<title>{escape(title)}: fastmoco report</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _pictures(pictures: Sequence[Picture]) -> str:
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{b64encode(png).decode()}">'
        f"<p>{escape(caption)}</p></figure>"
        for title, caption, png in pictures
    ]
    heading = "<h2>What the encoder holds to be alike</h2>"
    return f'{heading}<div class="pictures">{"".join(figures)}</div>'


def _sentences(run: RunRecords, index: int, several: bool) -> str:
    metrics = run.folder / METRICS
    look = f"{swatch(index)} <b>{escape(run.name)}</b><br>" if several else ""
    lines = [train_summary(metrics), knn_summary(metrics)]
    return f'<p class="summary">{look}{"<br>".join(map(_words, lines))}</p>'


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
            f"<li><b>{escape(who)}epoch {first:.2f} to {last:.2f}</b>: {_words(sentence)}</li>"
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

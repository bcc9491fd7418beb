"""Tables of the documents from the rows: `python -m bench.pages.tables [--check]`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. `--check` changes nothing
and exits 1 when a table differs from what the rows give, which is how CI finds a stale document.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.measure.harness import RESULTS, ROOT
from bench.measure.terminal import markdown

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "speed.md",
    ROOT / "docs" / "performance.md",
    ROOT / "docs" / "loader.md",
    ROOT / "docs" / "kernels.md",
)


Row = dict[str, Any]


TITLES = {
    "loader": "loader alone",
    "step": "**our step**",
    "end_to_end": "**our step, fed by the loader**",
    "encoder": "bare encoder: forward, backward, one more forward",
    "official": "published step",
    "official_kept": "published step, freed memory kept as in ours",
}


def read_rows(path: Path) -> list[Row]:
    """Rows of one results file; none if it is not there. Rows of a dirty tree do not count."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return [row for row in rows if not row["environment"]["dirty"]]


def latest(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of the latest run of every case, in the order in which cases first appeared."""
    runs: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        case = json.dumps(row["case"] | {"device": row["environment"]["device"]}, sort_keys=True)
        runs.setdefault(case, {}).setdefault(row["environment"]["date"], []).append(row)
    return [by_date[max(by_date)] for by_date in runs.values()]


# Header of a column and what stands in it; a row without the field has a dash.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("images/s p50", lambda row: figure(row["p50_images_per_second"])),
    (
        "p20 - p80",
        lambda row: " - ".join(figure(row[f"p{p}_images_per_second"]) for p in (20, 80)),
    ),
    ("share of the fp32 product rate", lambda row: f"{row['product_share_percent']:.0f} %"),
    ("CPU s per step", lambda row: f"{row['cpu_s_per_step']:.3f}"),
    ("peak memory", lambda row: f"{row['peak_memory_gib']:.2f} GiB"),
    ("host syncs per step", lambda row: str(row["host_syncs"])),
    ("kernel launches per step", lambda row: str(row["kernel_launches"])),
    ("power", lambda row: f"{row['power_w']:.0f} W"),
    ("SM clock", lambda row: f"{row['sm_clock_mhz']:.0f} MHz"),
    ("kWh per million images", lambda row: f"{row['kwh_per_million_images']:.3g}"),
)


def figure(value: float) -> str:
    """About four digits, none of them behind an `e`."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def cells(run: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers, the first empty, and one line per contestant; columns that nobody fills are out."""
    lines = [[_or_dash(make, row) for _, make in COLUMNS] for row in run]
    filled = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in lines)]
    titles = [TITLES[row["contestant"]] for row in run]
    body = [[title, *(line[i] for i in filled)] for title, line in zip(titles, lines, strict=True)]
    return ["", *(COLUMNS[i][0] for i in filled)], body


def _or_dash(make: Callable[[Row], str], row: Row) -> str:
    try:
        return make(row)
    except KeyError:
        return "-"


def caption(run: Sequence[Row]) -> str:
    """What was run, where and on what, in one line."""
    case, where = run[0]["case"], run[0]["environment"]
    on_cpu = where["device"] == "cpu"
    device = f"{where['cpu']} ({processor_of(run[0])})" if on_cpu else where["device"]
    threads = run[0].get("threads", where["threads"])
    return (
        f"{case['arch']}, {case['image_size']} px, batch {case['batch']}, "
        f"K = {case['queue_size']}, {case['precision']}, on {device} with {threads} "
        f"thread{'s' * (threads > 1)} (commit {where['commit'][:7]}, "
        f"load average {where['load_average']:g}):"
    )


def _throughput(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for run in latest(rows):
        lines += [caption(run), "", *markdown(*cells(run)), "", sentence(run), ""]
    return lines[:-1]


def processor_of(row: Row) -> str:
    """The class of processor that a row was measured on, such as `avx2`."""
    known = row["environment"].get("extension")
    told = re.search(r"\((avx\w+|amx\w+)\)", row["case"].get("precision_why", ""))
    # Rows that say neither come from one machine.
    return str(known or (told[1] if told else "avx512_bf16"))


def _speed(rows: Sequence[Row]) -> list[str]:
    """Our step against the published one, a line per machine class and network."""
    body: list[tuple[str, ...]] = []
    on_gpu = False
    for run in latest(rows):
        by_name, case = {row["contestant"]: row for row in run}, run[0]["case"]
        ratio = run[0]["ratios"].get("our step / published step")
        if ratio is None:
            continue
        cpu = run[0]["environment"]["device"] == "cpu"
        on_gpu |= not cpu
        place = f"2 cores, {processor_of(run[0])}" if cpu else run[0]["environment"]["device"]
        network = f"{case['arch'].replace('resnet', 'ResNet-')}, {case['image_size']} px"
        speeds = [figure(by_name[n]["p50_images_per_second"]) for n in ("official", "step")]
        body.append((place, network, case["precision"], *speeds, f"**{ratio[1]:.2f}**"))
    headers = ["machine", "network", "ours in", "published, images/s", "ours, images/s", "ratio"]
    if not on_gpu:
        body.append(("a CUDA GPU", "ResNet-50, 224 px", "bf16", "-", "-", "not measured yet"))
    return list(markdown(headers, sorted(body, key=lambda line: line[0])))


def sentence(run: Sequence[Row]) -> str:
    """The ratios of a contest and how it was run."""
    ratios = run[0]["ratios"]
    found = [f"{k}: **{v[1]:.2f}** ({v[0]:.2f} - {v[2]:.2f})" for k, v in ratios.items()]
    waits = [row["data_wait_percent"] for row in run if row["contestant"] == "end_to_end"]
    found += [f"waiting for data, end to end: **{wait:.1f} %**" for wait in waits]
    if "product_gflops" in run[0]:
        found += [f"a product of fp32 matrices: **{run[0]['product_gflops'][1]:.0f} GFLOP/s**"]
    how = f"{run[0]['n']} windows of each, in turns; what the loader feeds ran apart."
    return f"{'; '.join(found)}. {how}" if found else how


def _ablation(rows: Sequence[Row]) -> list[str]:
    """One table per case and run: every improvement switched off by itself, of whatever part."""
    cases: dict[str, list[list[Row]]] = {}
    for run in latest(rows):
        where = run[0]["environment"]
        case = run[0]["case"] | {"device": where["device"], "date": where["date"]}
        if case.pop("part") != "waterfall":
            cases.setdefault(json.dumps(case), []).append(run)
    lines: list[str] = []
    for runs in cases.values():
        head = caption(runs[0]).removesuffix(":")
        lines += [
            f"{head}; times relative to our step in the same turns, {runs[0][0]['n']} turns:",
            "",
            "| switched off | time of a step (p50) | p20 - p80 | CPU time |",
            "|---|---:|---:|---:|",
        ]
        for run in runs:
            for row in run:
                p20, p50, p80 = row["relative"]
                if p20 == p50 == p80 == 1:  # our step itself
                    continue
                lines.append(
                    f"| {row['contestant']} | {p50:.2f} | {p20:.2f} - {p80:.2f} | "
                    f"{row['relative_cpu']:.2f} |"
                )
        lines.append("")
    return lines[:-1]


def _threads(rows: Sequence[Row]) -> list[str]:
    """Settings of the host's threads, relative to the first one, which a run has by itself."""
    beside = {
        "loader": "fed by its loader",
        0: "images at hand, cores idle",
        1: "images at hand, beside one busy process",
        3: "images at hand, beside three busy processes",
        # Of rows whose first setting is libgomp's own waiting:
        "nobody": "images at hand, cores idle, GOMP_SPINCOUNT=300000",
        "process": "images at hand, beside one busy process, GOMP_SPINCOUNT=300000",
    }
    lines = [
        "| step | setting | images/s p50 | time of a step, to all threads (p50) | p20 - p80 |",
        "|---|---|---:|---:|---:|",
    ]
    for run in latest(rows):
        case, where = run[0]["case"], run[0]["environment"]
        for row in run:
            p20, p50, p80 = row["relative"]
            name = row["contestant"].replace("nothing", f"{where['threads']} threads")
            where_it_ran = beside.get(case["beside"], case["beside"])
            lines.append(
                f"| {case['arch']}, {case['image_size']} px, batch {case['batch']}, "
                f"{where_it_ran} | {name} | {figure(row['p50_images_per_second'])} | "
                f"{p50:.2f} | {p20:.2f} - {p80:.2f} |"
            )
    return lines if len(lines) > 2 else []


def _profile(rows: Sequence[Row]) -> list[str]:
    """Shares of the parts of a step fed by its loader."""
    runs = [run[-1] for run in latest(rows)]
    parts = sorted(
        {part for row in runs for part in row["shares"]},
        key=lambda part: -max(row["shares"].get(part, 0) for row in runs),
    )
    body = [
        [
            f"{row['case']['arch']}, {row['case']['image_size']} px, "
            f"batch {row['case']['batch']}, {row['threads']} threads",
            *(f"{row['shares'].get(part, 0):.1f} %" for part in parts),
        ]
        for row in runs
    ]
    return markdown(["", *parts], body) if body else []


def _where(row: Row) -> str:
    where = row["environment"]
    return f"{where['cpu']} (commit {where['commit'][:7]}, load average {where['load_average']:g})"


def _index(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for run in latest(rows):
        case = run[0]["case"]
        lines += [
            f"{case['files']:,} images in {case['folders']:,} folders, on {_where(run[0])}:",
            "",
            "| | seconds p50 | p20 - p80 | n | memory gained per image | of it not shared | peak |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in run:
            line = f"| {row['contender']} | {row['p50']:.3f} | {row['p20']:.3f} - {row['p80']:.3f} "
            line += f"| {row['n']} "
            for fact in ("gained_bytes", "own_bytes", "peak_bytes"):
                each = row[fact] / case["files"] if fact in row else None
                line += "| - " if each is None else f"| {each:.1f} bytes "
            lines.append(line + "|")
        size = run[0]["index_bytes"] / case["files"]
        lines += ["", f"The index on disk takes {size:.1f} bytes per image, names included.", ""]
    return lines[:-1]


def _loader(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for run in latest(rows):
        case = run[0]["case"]
        if not lines:
            lines += [f"On {_where(run[0])}; p20 - p80 over {run[0]['n']} windows each, in turns:"]
        ratio = "ratios" in run[0]
        lines += [
            "",
            f"| {case['part']} | {case['unit']} p50 | p20 - p80 |" + " x torchvision |" * ratio,
            "|---|---:|---:|" + "---:|" * ratio,
        ]
        for row in run:
            low, middle, high = (f"{row[name]:,.2f}" for name in ("p20", "p50", "p80"))
            line = f"| {row['contender']} | {middle} | {low} - {high} |"
            if ratio:
                p20, p50, p80 = row["ratios"]
                line += f" **{p50:.2f}** ({p20:.2f} - {p80:.2f}) |"
            lines.append(line)
    return lines


def _weight_gradient(rows: Sequence[Row]) -> list[str]:
    """Weight gradients of convolutions beside oneDNN's; the rate counts taps on padding as well."""
    runs = latest([row for row in rows if row["benchmark"] == "weight_gradient"])
    body = []
    for run in runs:
        case, by_name = run[0]["case"], {row["contender"]: row for row in run}
        times = [by_name[name]["p50_ms"] for name in ("official", "fastmoco")]
        n, c, side, o, k, stride = (case[name] for name in ("n", "c", "side", "o", "k", "stride"))
        flops = 2 * n * (-(-side // stride)) ** 2 * o * c * k**2  # padded by half a kernel
        name = f"{n}x{c}x{side}x{side} to {o}, {k}x{k}" + f", stride {stride}" * (stride > 1)
        gain = f"**{times[0] / times[1]:.2f}**"
        rates = [f"{flops / ms / 1e6:.0f}" for ms in times]
        body.append([name, *(f"{ms:.2f} ms" for ms in times), gain, *rates])
    if not body:
        return []
    first = runs[0][0]
    headers = ["official", "fastmoco", "gain", "GFLOP/s, official", "GFLOP/s, fastmoco"]
    return [
        f"On {_where(first)}, {first['environment']['threads']} threads; p50 of {first['n']} "
        "rounds, in turns:",
        "",
        *markdown(["input, outputs, kernel", *headers], body),
    ]


def _convolution(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of fp32 convolutions by each way, one line per layer and part of it."""
    runs = latest([row for row in rows if row["benchmark"] == "convolution"])
    ways = ("official", "direct", "winograd")
    body = []
    for run in runs:
        case, by_name = run[0]["case"], {row["contender"]: row for row in run}
        times = [by_name[way]["p50_ms"] if way in by_name else None for way in ways]
        n, c, side, o, k, stride = (case[name] for name in ("n", "c", "side", "o", "k", "stride"))
        flops = 2 * n * (-(-side // stride)) ** 2 * o * c * k**2
        name = f"{n}x{c}x{side}x{side} to {o}, {k}x{k}" + f", stride {stride}" * (stride > 1)
        best = min(ms for ms in times if ms is not None)
        body.append(
            [
                f"{name}: {case['part']}",
                *("-" if ms is None else f"{ms:.2f} ms" for ms in times),
                f"**{by_name['official']['p50_ms'] / best:.2f}**",
                f"{flops / best / 1e6:.0f}",
            ]
        )
    if not body:
        return []
    first = runs[0][0]
    return [
        f"On {_where(first)}, {first['environment']['threads']} threads; p50 of {first['n']} "
        "rounds, in turns:",
        "",
        *markdown(["input, outputs, kernel: part", *ways, "gain of the best", "GFLOP/s"], body),
    ]


TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "speed": ("throughput.jsonl", _speed),
    "throughput": ("throughput.jsonl", _throughput),
    "ablation": ("ablation.jsonl", _ablation),
    "threads": ("threads.jsonl", _threads),
    "profile": ("profile.jsonl", _profile),
    "index": ("index.jsonl", _index),
    "loader": ("loader.jsonl", _loader),
    "weight_gradient": ("kernels.jsonl", _weight_gradient),
    "convolution": ("kernels.jsonl", _convolution),
}


def table(name: str, results: Path = RESULTS) -> str:
    """The Markdown of one table; says so when there is no row yet."""
    file, make = TABLES[name]
    return "\n".join(make(read_rows(results / file)) or ["No row has been published yet."])


def between(text: str, name: str, lines: str) -> str:
    """`text` with these lines between the markers of that name. ValueError for want of a marker."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"no {begin} that {end} closes")
    return f"{head}{begin}\n{lines}\n{end}{tail}"


def with_tables(text: str, results: Path = RESULTS) -> str:
    """`text` with every known table brought up to date. ValueError for a marker left open."""
    for name in TABLES:
        if f"<!-- bench:{name} -->" in text:
            text = between(text, name, table(name, results))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when `--check` finds a stale table."""
    parser = argparse.ArgumentParser("bench.pages.tables", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--file", type=Path, help="instead of the documents")
    chosen = parser.parse_args(arguments)
    stale = 0
    for file in [chosen.file] if chosen.file else DOCUMENTS:
        old = file.read_text()
        new = with_tables(old)
        if old == new:
            continue
        if chosen.check:
            print(f"{file.name} is stale: run make bench-report", file=sys.stderr)
            stale = 1
        else:
            file.write_text(new)
    return stale


if __name__ == "__main__":
    sys.exit(main())

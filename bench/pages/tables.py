"""Tables of the documents from the rows: `python -m bench.pages.tables [--check]`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`. `--check` changes nothing
and exits 1 when a table differs from what the rows give, which is how CI finds a stale document.
A cell is a median and, in brackets, 20 and 80 % of the measurements; of fewer than three
measurements it is the median and their number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.measure.program import markdown
from bench.measure.rows import RESULTS, ROOT, Row, latest, read_rows

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_ROW = "No row has been published yet."
Run = Sequence[Row]
"""The rows of one run of one case: one row for each contestant."""
Made = tuple[list[str], list[list[str]]]
"""The headers and the lines of a table."""


def figure(value: float) -> str:
    """About four digits, none of them behind an `e`."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def cell(quantiles: Sequence[float], n: int, show: Callable[[float], str] = figure) -> str:
    """A median with p20 and p80, or with n where these would say nothing."""
    p20, p50, p80 = map(show, quantiles)
    return f"{p50} ({p20}-{p80})" if n >= 3 else f"{p50} (n={n})"


def _spread(row: Row, suffix: str = "") -> list[float]:
    return [row[f"p{p}{suffix}"] for p in (20, 50, 80)]


def _by_name(run: Run) -> dict[str, Row]:
    return {row["contestant"]: row for row in run}


def device(row: Row) -> str:
    """The GPU, or the processor and the class of its instructions."""
    where = row["environment"]
    on_cpu = where["device"] == "cpu"
    return f"{where['cpu']} ({where['extension']})" if on_cpu else str(where["device"])


def subject(row: Row) -> str:
    """Network, image side, batch, precision and class of machine, in a few words."""
    case, where = row["case"], row["environment"]
    place = where["extension"] if where["device"] == "cpu" else where["device"]
    network = f"{case['arch']}, {case['image_size']} px, batch {case['batch']}"
    return f"{network}, {case['precision']}, {place}"


def caption(row: Row) -> str:
    """What was run, where and on what, in one line."""
    case, where = row["case"], row["environment"]
    threads = row.get("threads", where["threads"])
    return (
        f"{case['arch']}, {case['image_size']} px, batch {case['batch']}, "
        f"K = {case['queue_size']}, {case['precision']}, on {device(row)} with {threads} "
        f"thread{'s' * (threads > 1)} (commit {where['commit'][:7]}, "
        f"load average {where['load_average']:g})"
    )


def speed(runs: Sequence[Run]) -> Made:
    """Our step against the published one, a line per machine class and network."""
    headers = ["machine", "network", "ours in", "published, images/s", "ours, images/s", "ratio"]
    body = []
    for run in runs:
        ratio = run[0]["ratios"].get("our step / published step")
        if ratio is None:
            continue
        by_name, case, where = _by_name(run), run[0]["case"], run[0]["environment"]
        cpu = where["device"] == "cpu"
        place = f"2 cores, {where['extension']}" if cpu else where["device"]
        network = f"{case['arch'].replace('resnet', 'ResNet-')}, {case['image_size']} px"
        speeds = [figure(by_name[n]["p50_images_per_second"]) for n in ("official", "step")]
        body.append([place, network, case["precision"], *speeds, f"**{ratio[1]:.2f}**"])
    if all(line[0].startswith("2 cores") for line in body):
        body.append(["a CUDA GPU", "ResNet-50, 224 px", "bf16", "-", "-", "not measured yet"])
    return headers, sorted(body, key=lambda line: line[0])


def throughput(runs: Sequence[Run]) -> Made:
    """Every contest of the step, a line per case."""
    names = {
        "step": "our step",
        "end_to_end": "fed by the loader",
        "encoder": "bare encoder",
        "official": "published",
        "official_kept": "published, memory kept",
    }
    ratios = ["our step / published step", "our step / bare encoder"]
    share = "ours, % of the fp32 product rate"
    headers = ["images/s", *names.values(), *ratios, share, "peak GiB, ours and published"]
    body = []
    for run in runs:
        by_name, shared, n = _by_name(run), run[0], run[0]["n"]
        rates = [
            figure(by_name[name]["p50_images_per_second"]) if name in by_name else "-"
            for name in names
        ]
        found = [shared["ratios"].get(title) for title in ratios]
        memory = [
            figure(by_name[name]["peak_memory_gib"])
            for name in ("step", "official")
            if name in by_name
        ]
        body.append(
            [
                subject(shared),
                *rates,
                *(cell(ratio, n) if ratio else "-" for ratio in found),
                f"{by_name['step'].get('product_share_percent', '-')}",
                ", ".join(memory),
            ]
        )
    return headers, body


def ablation(runs: Sequence[Run]) -> Made:
    """The time of a step without an improvement, relative to our step; a column per case."""
    columns: dict[str, dict[str, Row]] = {}
    for run in runs:
        if run[0]["case"]["part"] != "waterfall":
            columns.setdefault(subject(run[0]), {}).update(_by_name(run))
    names = dict.fromkeys(name for column in columns.values() for name in column)
    body = [
        [name, *(_relative(column.get(name)) for column in columns.values())]
        for name in names
        if name != "nothing"  # our step itself
    ]
    return ["switched off", *columns], body


def _relative(row: Row | None) -> str:
    if row is None:
        return "-"
    # What all others are relative to is 1 in every turn.
    return "1" if set(row["relative"]) == {1} else cell(row["relative"], row["n"], "{:.2f}".format)


def threads(runs: Sequence[Run]) -> Made:
    """Settings of the threads' waiting beside busy processes, on processors with AVX2."""
    beside = {0: "idle", 1: "beside one busy process", 3: "beside three"}
    columns = {
        run[0]["case"]["beside"]: _by_name(run)
        for run in runs
        if run[0]["environment"]["extension"] == "avx2"
    }
    names = dict.fromkeys(name for column in columns.values() for name in column)
    shown = [key for key in beside if key in columns]
    body = [
        [name.replace("nothing", "ours"), *(_relative(columns[key].get(name)) for key in shown)]
        for name in names
    ]
    return ["time of a step", *(beside[key] for key in shown)], body


def profile(runs: Sequence[Run]) -> Made:
    """Percent of the parts of a step fed by its loader."""
    rows = [run[-1] for run in runs]
    parts = sorted(
        {part for row in rows for part in row["shares"]},
        key=lambda part: -max(row["shares"].get(part, 0) for row in rows),
    )
    body = [
        [subject(row), *(f"{row['shares'].get(part, 0):.1f}" for part in parts)] for row in rows
    ]
    return ["percent of the time", *parts], body


def index(runs: Sequence[Run]) -> Made:
    """What a folder of so many images costs at a start."""
    headers = ["", "seconds", "memory gained, bytes per image"]
    body = []
    for row in runs[-1] if runs else ():
        gained = row["gained_bytes"] / row["case"]["files"] if "gained_bytes" in row else None
        seconds = cell(_spread(row), row["n"], "{:.3f}".format)
        body.append([row["contestant"], seconds, f"{gained:.1f}" if gained else "-"])
    return headers, body


def loader(runs: Sequence[Run]) -> Made:
    """Rates of the pipelines and their parts."""
    body = [
        [
            f"{row['case']['part']}: {row['contestant']}, {row['case']['unit']}",
            cell(_spread(row), row["n"]),
            cell(row["ratios"], row["n"]) if "ratios" in row else "-",
        ]
        for run in runs
        for row in run
    ]
    return ["", "median", "times torchvision"], body


def weight_gradient(runs: Sequence[Run]) -> Made:
    """Weight gradients of convolutions beside oneDNN's."""
    return _layers(runs, ["official", "fastmoco"])


def convolution(runs: Sequence[Run]) -> Made:
    """fp32 convolutions by each way, one line per layer and part of it."""
    return _layers(runs, ["official", "direct", "winograd"])


def _layers(runs: Sequence[Run], ways: list[str]) -> Made:
    """Milliseconds of a layer by each way; the rate counts taps on padding as well."""
    body = []
    for run in runs:
        case, by_name = run[0]["case"], _by_name(run)
        n, c, side, o, k, stride = (case[name] for name in ("n", "c", "side", "o", "k", "stride"))
        name = f"{n}x{c}x{side}x{side} to {o}, {k}x{k}" + f", stride {stride}" * (stride > 1)
        name += f": {case['part']}" if "part" in case else ""
        times = [by_name[way]["p50_ms"] for way in ways if way in by_name]
        flops = 2 * n * (-(-side // stride)) ** 2 * o * c * k**2  # padded by half a kernel
        shown = [f"{by_name[way]['p50_ms']:.2f}" if way in by_name else "-" for way in ways]
        gain = f"**{times[0] / min(times[1:]):.2f}**"
        body.append([name, *shown, gain, f"{flops / min(times[1:]) / 1e6:.0f}"])
    return ["milliseconds", *ways, "gain", "GFLOP/s of the best"], body


def scaling(runs: Sequence[Run]) -> Made:
    """What collectives bring to a rank in a step, without gradients, and their modelled time."""
    shown = {"all_to_all": "`all_to_all`", "loader": "`loader`", "official": "published"}
    headers = ["ranks"]
    headers += [f"{title}, MB" for title in shown.values()]
    headers += [f"{title}, ms *modelled*" for title in shown.values()]
    body = []
    for run in runs:
        by_name, ranks = _by_name(run), run[0]["case"]["ranks"]
        if ranks in (2, 8, 64, 1024):
            received = [by_name[name]["received_bytes"] for name in shown]
            sizes = [sum(found.values()) - found["gradients"] for found in received]
            times = [by_name[name]["modelled_ms"] for name in shown]
            cells = [f"{size / 1e6:,.1f}" for size in sizes] + [f"{ms:.3g}" for ms in times]
            body.append([str(ranks), *cells])
    return headers, body


TABLES: dict[str, tuple[str, Callable[[Sequence[Run]], Made]]] = {
    "speed": ("throughput", speed),
    "throughput": ("throughput", throughput),
    "ablation": ("ablation", ablation),
    "threads": ("threads", threads),
    "profile": ("profile", profile),
    "index": ("index", index),
    "loader": ("loader", loader),
    "scaling": ("scaling", scaling),
    "weight_gradient": ("kernels", weight_gradient),
    "convolution": ("kernels", convolution),
}


def table(name: str, results: Path = RESULTS) -> str:
    """The Markdown of one table; says so when there is no row yet."""
    file, make = TABLES[name]
    rows = read_rows(results / f"{file}.jsonl")
    if file == "kernels":  # one file for all operations
        rows = [row for row in rows if row["benchmark"] == name]
    headers, body = make(latest(rows))
    return "\n".join(markdown(headers, body)) if body else NO_ROW


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

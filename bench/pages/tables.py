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

from bench import roofline
from bench.measure.rows import RESULTS, ROOT, Row, latest, read_rows
from bench.roofline import Made

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_ROW = "No row has been published yet."
OPERATIONS = {
    "info_nce": "InfoNCE",
    "info_nce_enqueue": "InfoNCE and enqueue",
    "ema": "`ema_`",
    "sgd_ema": "`sgd_ema_`",
    "batch_norm": "batch norm, addition, ReLU",
    "weight_gradient": "weight gradient",
    "convolution": "convolution",
    "max_pool": "max pooling",
    "photometric": "photometric augmentation",
    "crop_resize": "crop and resize",
}
REMOVED = ("max_pool", "cpu")
"""The operation and device of a kernel that has been removed since."""
# Rows of improvements that have been removed since.
GONE = "max pooling (ATen's instead)"
Run = dict[str, Row]
"""The rows of one run of one case, by contestant."""


def place(row: Row) -> str:
    """The class of machine."""
    where = row["environment"]
    return str(where["extension"] if where["device"] == "cpu" else where["device"])


def subject(row: Row) -> str:
    """Network, image side, batch, precision and class of machine, in a few words."""
    case = row["case"]
    network = f"{case['arch']}, {case['image_size']} px, batch {case['batch']}"
    return f"{network}, {case['precision']}, {place(row)}"


def one(run: Run) -> Row:
    """Any of its rows: what they say of the case they say alike."""
    return next(iter(run.values()))


def _ratios(run: Run) -> dict[str, list[float]]:
    """Those of all contests in which the case was measured."""
    return {title: ratio for row in run.values() for title, ratio in row["ratios"].items()}


def _with_ours(run: Run) -> Run:
    """The run, with our step as a CUDA graph for our step where only that was raced."""
    return {"step": run["captured"], **run} if "captured" in run else run


def _against_published(run: Run) -> list[float]:
    """Quantiles of our speed over the published one; that of medians where turns say none; []."""
    if ratio := _ratios(run).get("our step / published step"):
        return ratio
    if not run.keys() >= {"step", "official"}:
        return []
    ours, theirs = (run[name]["p50_images_per_second"] for name in ("step", "official"))
    return [ours / theirs]


def speed(runs: Sequence[Run]) -> Made:
    """Our step against the published one, a line per machine class, network and batch."""
    headers = ["machine", "network", "batch", "ours in", "published, images/s", "ours, images/s"]
    headers += ["ratio"]
    body = []
    for run in map(_with_ours, runs):
        if ratio := _against_published(run):
            where, case = one(run)["environment"], one(run)["case"]
            machine = "2 cores, " * (where["device"] == "cpu") + place(one(run))
            network = f"{case['arch'].replace('resnet', 'ResNet-')}, {case['image_size']} px"
            speeds = [figure(run[n]["p50_images_per_second"]) for n in ("official", "step")]
            batch = str(case["batch"])
            body.append(
                [
                    machine,
                    network,
                    batch,
                    case["precision"],
                    *speeds,
                    f"**{ratio[len(ratio) // 2]:.2f}**",
                ]
            )
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
    for run in map(_with_ours, runs):
        if names.keys() & run.keys():
            known, n = _ratios(run), one(run)["n"]
            if ratio := _against_published(run):
                known["our step / published step"] = ratio
            rates = [run[name]["p50_images_per_second"] if name in run else 0 for name in names]
            cells = [figure(rate) if rate else "-" for rate in rates]
            cells += [cell(known[title], n) if title in known else "-" for title in ratios]
            cells.append(f"{run.get('step', {}).get('product_share_percent', '-')}")
            memory = [run[who]["peak_memory_gib"] for who in ("step", "official") if who in run]
            body.append([subject(one(run)), *cells, ", ".join(map(figure, memory)) or "-"])
    return headers, body


def ablation(runs: Sequence[Run]) -> Made:
    """The time of a step without an improvement, relative to our step; a column per case."""
    columns: dict[str, Run] = {}
    for run in runs:
        if one(run)["case"]["part"] == "switches":
            columns.setdefault(subject(one(run)), {}).update(run)

    def relative(row: Row | None) -> str:
        return cell(row["relative"], row["n"], "{:.2f}".format) if row else "-"

    names = dict.fromkeys(name for column in columns.values() for name in column)
    body = [
        [name, *(relative(column.get(name)) for column in columns.values())]
        for name in names
        if name not in ("nothing", GONE)  # the first is our step itself
    ]
    return ["switched off", *columns], body


def profile(runs: Sequence[Run]) -> Made:
    """Percent of the parts of a step fed by its loader; small ones are left out."""
    rows = [one(run) for run in runs]
    most: dict[str, float] = {}
    for part, share in (item for row in rows for item in row["shares"].items()):
        most[part] = max(share, most.get(part, 0.0))
    parts = sorted((part for part in most if most[part] >= 1), key=lambda part: -most[part])
    body = [
        [subject(row), *(f"{row['shares'].get(part, 0):.1f}" for part in parts)] for row in rows
    ]
    return ["percent of the time", *parts], body


def loader(runs: Sequence[Run]) -> Made:
    """Rates of the pipelines."""
    body = [
        [
            f"{row['case'].get('megapixels', 0.2)} megapixels, {row['environment']['extension']}",
            row["contestant"],
            cell([row["p20"], row["p50"], row["p80"]], row["n"]),
            cell(row["ratios"], row["n"]) if "ratios" in row else "-",
        ]
        for run in runs
        for row in run.values()
        if row["case"]["part"] == "pipeline"
    ]
    return ["images, processor", "", "images/s", "times torchvision"], body


def kernels(runs: Sequence[Run]) -> Made:
    """Every operation by itself: the range of its cases, on each class of machine."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        op, case = one(run)["benchmark"], one(run)["case"]
        if op in OPERATIONS and (op, case["device"]) != REMOVED:
            operation = " ".join(filter(None, (OPERATIONS[op], case.get("dtype"))))
            groups.setdefault(f"{operation}, {place(one(run))}", []).append(run)
    body = []
    for key, cases in groups.items():
        # What nobody has published is compared with its reference.
        official = [run["official" if "official" in run else "eager"] for run in cases]
        ours = [_ours(run) for run in cases]
        compiled = [run.get("compiled", run.get("official compiled", {})) for run in cases]
        shown = [_range([row["p50_ms"] for row in way]) for way in (official, ours)]
        shown += [f"**{_gain(official, ours)}**", _gain(compiled, ours) if all(compiled) else "-"]
        memory = [_range([row["peak_extra_bytes"] / 2**20 for row in x]) for x in (ours, official)]
        body.append([f"{key} ({len(cases)})", *shown, " of ".join(memory)])
    headers = ["operation, machine (cases)", "official, ms", "ours, ms", "gain"]
    return [*headers, "gain over torch.compile", "memory, MiB"], body


def _ours(run: Run) -> Row:
    """Our way; of several, of which the layer takes one, the fastest."""
    ways = [run[way] for way in ("fastmoco", "direct", "winograd") if way in run]
    return min(ways, key=lambda row: float(row["p50_ms"]))


def _gain(others: Sequence[Row], ours: Sequence[Row]) -> str:
    pairs = zip(others, ours, strict=True)
    return _range([other["p50_ms"] / mine["p50_ms"] for other, mine in pairs])


def _range(values: Sequence[float]) -> str:
    ends = list(dict.fromkeys(figure(end) for end in (min(values), max(values))))
    return "-".join(ends)


def scaling(runs: Sequence[Run]) -> Made:
    """What collectives bring to a rank in a step, without gradients, and their modelled time."""
    shown = {"all_to_all": "`all_to_all`", "loader": "`loader`", "official": "published"}
    headers = ["ranks"]
    headers += [f"{title}, MB" for title in shown.values()]
    headers += [f"{title}, ms *modelled*" for title in shown.values()]
    body = []
    for run in runs:
        ranks = one(run)["case"]["ranks"]
        if ranks in (2, 8, 64, 1024):
            received = [run[name]["received_bytes"] for name in shown]
            sizes = [sum(found.values()) - found["gradients"] for found in received]
            times = [run[name]["modelled_ms"] for name in shown]
            cells = [f"{size / 1e6:,.1f}" for size in sizes] + [f"{ms:.3g}" for ms in times]
            body.append([str(ranks), *cells])
    return headers, body


TABLES: dict[str, tuple[str, Callable[[Sequence[Run]], Made]]] = {
    "speed": ("throughput", speed),
    "throughput": ("throughput", throughput),
    "ablation": ("ablation", ablation),
    "profile": ("profiling", profile),
    "loader": ("loader", loader),
    "scaling": ("scaling", scaling),
    "kernels": ("kernels", kernels),
    "ledger": ("ledger", roofline.counts),
    "model": ("ledger", roofline.times),
}


def figure(value: float) -> str:
    """About four digits, none of them behind an `e`."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def cell(quantiles: Sequence[float], n: int, shown_as: Callable[[float], str] = figure) -> str:
    """A median with p20 and p80, or with n where these would say nothing; or the only value."""
    if len(quantiles) == 1:
        return shown_as(quantiles[0])
    p20, p50, p80 = map(shown_as, quantiles)
    return f"{p50} ({p20}-{p80})" if n >= 3 else f"{p50} (n={n})"


def markdown(headers: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    rule = "|---|" + "---:|" * (len(headers) - 1)
    top = f"| {' | '.join(headers)} |".replace("|  |", "| |")
    return [top, rule, *(f"| {' | '.join(line)} |" for line in body)]


def table(name: str, results: Path = RESULTS) -> str:
    """The Markdown of one table; says so when there is no row yet."""
    file, make = TABLES[name]
    headers, body = make(latest(read_rows(results / f"{file}.jsonl")))
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

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
from bench.measure.program import cell, figure, markdown
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
Run = Sequence[Row]
"""The rows of one run of one case: one row for each contestant."""


def _spread(row: Row, suffix: str = "") -> list[float]:
    return [row[f"p{p}{suffix}"] for p in (20, 50, 80)]


def _by_name(run: Run) -> dict[str, Row]:
    return {row["contestant"]: row for row in run}


def place(row: Row) -> str:
    """The class of machine."""
    where = row["environment"]
    return str(where["extension"] if where["device"] == "cpu" else where["device"])


def subject(row: Row) -> str:
    """Network, image side, batch, precision and class of machine, in a few words."""
    case = row["case"]
    network = f"{case['arch']}, {case['image_size']} px, batch {case['batch']}"
    return f"{network}, {case['precision']}, {place(row)}"


def _ratios(run: Run) -> dict[str, list[float]]:
    """Those of all contests in which the case was measured."""
    return {title: ratio for row in run for title, ratio in row["ratios"].items()}


def speed(runs: Sequence[Run]) -> Made:
    """Our step against the published one, a line per machine class and network."""
    headers = ["machine", "network", "ours in", "published, images/s", "ours, images/s", "ratio"]
    body = []
    for run in runs:
        ratio = _ratios(run).get("our step / published step")
        if ratio is None:
            continue
        by_name, case = _by_name(run), run[0]["case"]
        machine = "2 cores, " * (run[0]["environment"]["device"] == "cpu") + place(run[0])
        network = f"{case['arch'].replace('resnet', 'ResNet-')}, {case['image_size']} px"
        speeds = [figure(by_name[n]["p50_images_per_second"]) for n in ("official", "step")]
        body.append([machine, network, case["precision"], *speeds, f"**{ratio[1]:.2f}**"])
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
        by_name, known, n = _by_name(run), _ratios(run), run[0]["n"]
        rates = [by_name.get(name, {}).get("p50_images_per_second") for name in names]
        memory = [
            by_name[name]["peak_memory_gib"] for name in ("step", "official") if name in by_name
        ]
        body.append(
            [
                subject(run[0]),
                *(figure(rate) if rate else "-" for rate in rates),
                *(cell(known[title], n) if title in known else "-" for title in ratios),
                f"{by_name.get('step', {}).get('product_share_percent', '-')}",
                ", ".join(map(figure, memory)) or "-",
            ]
        )
    return headers, body


def ablation(runs: Sequence[Run]) -> Made:
    """The time of a step without an improvement, relative to our step; a column per case."""
    columns: dict[str, dict[str, Row]] = {}
    for run in runs:
        if run[0]["case"]["part"] == "switches":
            columns.setdefault(subject(run[0]), {}).update(_by_name(run))
    names = dict.fromkeys(name for column in columns.values() for name in column)
    body = [
        [name, *(_relative(column.get(name)) for column in columns.values())]
        for name in names
        if name not in ("nothing", GONE)  # the first is our step itself
    ]
    return ["switched off", *columns], body


def _relative(row: Row | None) -> str:
    if row is None:
        return "-"
    # What all others are relative to is 1 in every turn.
    return "1" if set(row["relative"]) == {1} else cell(row["relative"], row["n"], "{:.2f}".format)


def profile(runs: Sequence[Run]) -> Made:
    """Percent of the parts of a step fed by its loader; small ones are left out."""
    rows = [run[-1] for run in runs]
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
            cell(_spread(row), row["n"]),
            cell(row["ratios"], row["n"]) if "ratios" in row else "-",
        ]
        for run in runs
        for row in run
        if row["case"]["part"] == "pipeline"
    ]
    return ["images, processor", "", "images/s", "times torchvision"], body


def kernels(runs: Sequence[Run]) -> Made:
    """Every operation by itself: the range of its cases, on each class of machine."""
    groups: dict[str, list[dict[str, Row]]] = {}
    for run in runs:
        name, case = OPERATIONS.get(run[0]["benchmark"]), run[0]["case"]
        if name is None or (run[0]["benchmark"], case["device"]) == REMOVED:
            continue
        operation = " ".join(filter(None, (name, case.get("dtype"))))
        groups.setdefault(f"{operation}, {place(run[0])}", []).append(_by_name(run))
    body = []
    for key, cases in groups.items():
        # What nobody has published is compared with its reference.
        official = [rows["official" if "official" in rows else "eager"] for rows in cases]
        ours = [_ours(rows) for rows in cases]
        compiled = [rows.get("compiled", rows.get("official compiled", {})) for rows in cases]
        shown = [_range([row["p50_ms"] for row in way]) for way in (official, ours)]
        shown += [f"**{_gain(official, ours)}**", _gain(compiled, ours) if all(compiled) else "-"]
        memory = [_range([row["peak_extra_bytes"] / 2**20 for row in x]) for x in (ours, official)]
        body.append([f"{key} ({len(cases)})", *shown, " of ".join(memory)])
    headers = ["operation, machine (cases)", "official, ms", "ours, ms", "gain"]
    return [*headers, "gain over torch.compile", "memory, MiB"], body


def _ours(by_name: dict[str, Row]) -> Row:
    """Our way; of several, of which the layer takes one, the fastest."""
    ways = [by_name[way] for way in ("fastmoco", "direct", "winograd") if way in by_name]
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
    "profile": ("profiling", profile),
    "loader": ("loader", loader),
    "scaling": ("scaling", scaling),
    "kernels": ("kernels", kernels),
    "ledger": ("ledger", roofline.counts),
    "model": ("ledger", roofline.times),
}


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

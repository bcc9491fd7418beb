"""Picture of a run from its `metrics.jsonl`, the record that every run writes.

One panel per question, over the epochs: the loss beside ln(1 + K), the loss of a random guess;
pretext accuracy; kNN accuracy beside what raw pixels, the untrained encoder and chance achieve;
learning rate; speed; waiting for data. A panel for which a run recorded nothing is left out.
`fastmoco report RUN_DIR` draws `RUN_DIR/curves.png`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastmoco.config import ConfigError
from fastmoco.config.names import in_figure
from fastmoco.machine import durable
from fastmoco.run.record import Record, read_metrics, series

BLUE, ORANGE, GREEN, PURPLE = "#3564c4", "#e07b28", "#2c9a6b", "#8a56b5"


INK, FAINT = "#2b2f36", "#8a919c"


def _curve(
    axes: Axes, records: list[Record], kind: str, name: str, colour: str, label: str, scale: float
) -> bool:
    """Draw one metric times `scale`; False when the run has none of it."""
    epochs, values = series(records, kind, name)
    if not epochs:
        return False
    # Few points are shown as such: a single one would be invisible as a line.
    marker = "o" if len(epochs) <= 25 else ""
    values = [value * scale for value in values]
    axes.plot(epochs, values, color=colour, label=label, marker=marker, markersize=3.5, lw=1.8)
    axes.annotate(
        f"{values[-1]:.3g}",
        (epochs[-1], values[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontweight="bold",
        annotation_clip=False,
    )
    return True


def _level(axes: Axes, value: float, label: str, style: str = "--") -> None:
    """A horizontal line to compare with, named in the legend."""
    axes.axhline(value, color=FAINT, linestyle=style, lw=1.2, label=label)


def _loss(axes: Axes, records: list[Record]) -> bool:
    axes.set_title("Loss (InfoNCE)")
    found = _curve(axes, records, "train", "loss", BLUE, "training", 1)
    guess = series(records, "train", "loss_random")[1]
    if found and guess:
        _level(axes, guess[-1], f"ln(1 + K) = {guess[-1]:.2f}, a random guess")
    return found


def _pretext(axes: Axes, records: list[Record]) -> bool:
    axes.set_title("Pretext accuracy (%)")
    five = _curve(axes, records, "train", "pretext_top5", ORANGE, "key among the first five", 100)
    one = _curve(axes, records, "train", "pretext_top1", BLUE, "key found", 100)
    axes.set_ylim(0, 100)
    return one or five


def _knn(axes: Axes, records: list[Record]) -> bool:
    axes.set_title("kNN accuracy on held-out images (%)")
    found = _curve(axes, records, "knn", "knn_top1", GREEN, "trained encoder", 100)
    for record in records:
        if record.kind == "knn_baseline":
            names = (("untrained", "untrained encoder", "--"), ("raw_pixel", "raw pixels", "-."))
            for name, label, style in (*names, ("chance", "chance", ":")):
                if name in record.values:
                    value = 100 * record.values[name]
                    _level(axes, value, f"{label}: {value:.1f}", style)
                    found = True
            break
    axes.set_ylim(bottom=0)  # last, because it freezes the top at what is drawn so far
    return found


def _rate(axes: Axes, records: list[Record]) -> bool:
    axes.set_title("Learning rate")
    found = _curve(axes, records, "train", "lr", PURPLE, "learning rate", 1)
    axes.set_ylim(bottom=0)
    return found


def _speed(axes: Axes, records: list[Record]) -> bool:
    axes.set_title("Image pairs per second")
    found = _curve(axes, records, "train", "images_per_second", ORANGE, "images/s", 1)
    axes.set_ylim(bottom=0)
    return found


def _wait(axes: Axes, records: list[Record]) -> bool:
    axes.set_title("Time spent waiting for data (%)")
    found = _curve(axes, records, "train", "data_wait_percent", PURPLE, "data wait", 1)
    axes.set_ylim(0, 100)
    return found


# In reading order, two rows: what is learned above, what it costs below.
PANELS: tuple[Callable[[Axes, list[Record]], bool], ...] = (
    _loss,
    _pretext,
    _knn,
    _rate,
    _speed,
    _wait,
)


def draw_curves(metrics_jsonl: Path, out: Path) -> None:
    """Draw the curves of a run to `out`, a PNG.

    The file appears whole: a viewer that is open while the run redraws it never sees half.

    Raises `ConfigError` when the metrics cannot be read or hold nothing to draw, and when `out`
    cannot be written.
    """
    records = read_metrics(metrics_jsonl)
    drawn = [panel for panel in PANELS if panel(Figure().add_subplot(), records)]
    if not drawn:
        raise ConfigError(f"{metrics_jsonl} holds no metrics to draw yet.")
    columns = (len(drawn) + 1) // 2
    rows = (len(drawn) + columns - 1) // columns
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.15)  # type: ignore[union-attr, call-arg]
    end = max((r.epoch for r in records), default=0.0) or 1.0
    for place, panel in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, place)
        panel(axes, records)
        _dress(axes, end)
    where = f", step {records[-1].step}"
    figure.suptitle(
        in_figure(f"{metrics_jsonl.parent.name}{where}"), color=FAINT, fontsize=9, x=0.01, ha="left"
    )
    FigureCanvasAgg(figure)
    try:
        durable.replace(
            out, lambda partial: figure.savefig(partial, format="png", facecolor="white")
        )
    except OSError as error:
        raise ConfigError(f"Cannot write the curves {out}: {error}.") from error


def _dress(axes: Axes, end: float) -> None:
    """The common look: epochs 0 to `end`, no box, light grid, a legend where it is needed."""
    axes.title.set_fontsize(10)
    axes.title.set_color(INK)
    axes.title.set_fontweight("bold")
    axes.set_xlabel("epoch", color=FAINT, fontsize=9)
    axes.grid(axis="y", color="#e8eaee", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(0, end * 1.02)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c9cdd4")
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)

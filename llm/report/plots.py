"""Curves of one run, or of several over each other, as PNG."""

import io
from dataclasses import dataclass
from itertools import cycle

from llm.report.record import Curve, Run

MAX_POINTS = 1500  # a curve has no more pixels to show
COLOURS = ("#2457c5", "#d9661f", "#2f8f5b", "#9b3fb5", "#b8912b", "#c2344d", "#3c8fa8", "#6b7280")
STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    unit: str
    series: dict[str, str]
    """Metric -> what it is called in the legend."""
    stacked: bool = False
    log: bool = False


_SHARES = {f"time/{name}_share": name.replace("_", " ") for name in ("training", "data_wait", "validating", "saving", "other")}
_MEMORY = {"memory/gpu_peak_gb": "GPU, at most", "memory/host_peak_gb": "host, at most", "memory/host_gb": "host"}
PLOTS = (
    Plot("loss", "Loss", "nats per token", {"train/loss": "training", "val/loss": "validation"}),
    Plot("bits_per_byte", "Bits per byte, validation", "bits", {"val/bits_per_byte": "validation"}),
    Plot("learning_rate", "Learning rate", "", {"train/lr": "learning rate"}),
    Plot("grad_norm", "Gradient norm before clipping", "L2 norm", {"train/grad_norm": "gradient norm"}, log=True),
    Plot("speed", "Speed", "tokens/s", {"speed/tokens_per_s": "tokens/s"}),
    Plot("mfu", "Model FLOP utilisation", "share of peak", {"speed/mfu": "MFU"}),
    Plot("time", "Where the time goes", "share", _SHARES, stacked=True),
    Plot("memory", "Memory of rank 0", "GB", _MEMORY),
)


def plots_of(runs: list[Run]) -> list[Plot]:
    """Those with something to show. What is stacked can be shown for one run only, and from two points on."""
    found = []
    for plot in PLOTS:
        points = max(len(run.curves.get(key, ())) for run in runs for key in plot.series)
        if points > plot.stacked and not (plot.stacked and len(runs) > 1):
            found.append(plot)
    if asked := _named(runs, "eval/", "/all"):
        found.append(Plot("tasks", "Tasks while training", "share answered correctly", asked))
    if (tokens := _named(runs, "data/", "_tokens")) and len(runs) == 1:
        found.append(Plot("data", "Tokens drawn from each dataset", "tokens", tokens))
    return found


def _named(runs: list[Run], start: str, end: str) -> dict[str, str]:
    """The metrics between `start` and `end`, and what stands between."""
    return {key: key[len(start) : -len(end)] for run in runs for key in run.curves if key.startswith(start) and key.endswith(end)}


def draw(plot: Plot, runs: list[Run]) -> bytes:
    """A PNG. Several runs have a colour each, and their second series is dashed."""
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

    look = {
        "font.size": 10, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1ad",
        "axes.grid": True, "grid.color": "#e6e8ec", "axes.axisbelow": True, "axes.labelcolor": "#4a5160", "xtick.color": "#4a5160",
        "ytick.color": "#4a5160", "legend.frameon": False, "axes.titlelocation": "left", "axes.titleweight": "bold", "lines.linewidth": 1.5,
    }  # fmt: skip
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(6, 3.3), layout="constrained")
        axes = figure.subplots()
        handles, labels = (_stack if plot.stacked else _lines)(axes, plot, runs)
        axes.set(title=plot.title, xlabel="optimizer step", ylabel=plot.unit)
        if plot.log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.LogFormatter())  # the usual one writes its powers as formulas
            axes.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))
        if plot.unit.startswith("tokens"):
            axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))  # 20k, 1.5M
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        if len(labels) > 1:
            figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=min(len(labels), 5 if plot.stacked else 3))
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return png.getvalue()


def _lines(axes, plot: Plot, runs: list[Run]) -> tuple[list, list[str]]:
    handles, labels, colours = [], [], cycle(COLOURS)
    shown = [key for key in plot.series if any(key in run.curves for run in runs)]
    for run in runs:
        of_run = next(colours) if len(runs) > 1 else None
        for number, key in enumerate(shown):
            if key not in run.curves:
                continue
            curve = thinned(run.curves[key])
            style = STYLES[number % len(STYLES)] if of_run else "-"
            marker = "o" if len(curve) == 1 or (len(curve) < 60 and key.startswith("val/")) else ""  # of one point there is no line
            handles += axes.plot(*zip(*curve, strict=True), style, marker=marker, markersize=3.5, color=of_run or next(colours))
            name = plot.series[key] if not of_run else run.name if len(shown) == 1 else f"{run.name}, {plot.series[key]}"
            labels.append(name)
    return handles, labels


def _stack(axes, plot: Plot, runs: list[Run]) -> tuple[list, list[str]]:
    (run,) = runs
    shown = [key for key in plot.series if key in run.curves]
    steps, _ = zip(*thinned(run.curves[shown[0]]), strict=True)
    values = [[curve.get(step, 0.0) for step in steps] for curve in (dict(run.curves[key]) for key in shown)]
    areas = axes.stackplot(steps, values, colors=COLOURS[: len(shown)], alpha=0.85, linewidth=0)
    axes.set_ylim(0, 1)
    return areas, [plot.series[key] for key in shown]


def thinned(curve: Curve) -> Curve:
    """At most about MAX_POINTS of it, evenly, and always its last one."""
    stride = -(-len(curve) // MAX_POINTS)
    return curve if stride == 1 else [*curve[:-1:stride], curve[-1]]

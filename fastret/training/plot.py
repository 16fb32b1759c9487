"""plot.png: the loss of every step, what tests found, and retrieval before and after; needs matplotlib."""

from pathlib import Path
from textwrap import fill

from fastret.training.losses import training_loss
from fastret.training.report import Report

NAME = "plot.png"
BEFORE, AFTER = "#b8bec9", "#1f5fbf"
LINES = (":", "--")  # of the yardsticks


def write_plot(report: Report, folder: Path) -> None:
    """Write ``folder``/plot.png.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'fastret[plot]'") from error

    # A figure of its own, without pyplot: no display, no global state.
    figure = Figure(figsize=(14 if report.curve else 10, 4), layout="constrained")
    left, right = (1, 1) if len(report.after.named()) > 3 else (3, 2)
    widths = (left, left, right) if report.curve else (left, right)
    loss, *tests, retrieval = figure.subplots(1, len(widths), width_ratios=widths)

    steps = range(1, len(report.history) + 1)
    loss.plot(steps, report.history, color=AFTER, linewidth=1.5, marker="o" if len(report.history) == 1 else None)
    loss.set_yscale("log")
    loss.set_title(f"Training loss ({report.options.loss})")
    loss.set_xlabel("iteration")
    loss.set_ylabel("loss (log scale)")
    loss.grid(which="major", alpha=0.3)

    names = list(report.after.named())
    for curve in tests:
        epochs = [point.epoch for point in report.curve]
        curve.plot(epochs, [100 * point.share for point in report.curve], color=AFTER, marker="o", markersize=3)
        curve.set_title(f"{names[0]} after so many epochs")
        curve.set_xlabel("epoch")
        curve.xaxis.get_major_locator().set_params(integer=True)
        curve.set_ylabel("%")
        curve.grid(alpha=0.3)
    bars_of = ((-0.2, "untrained", BEFORE, report.before), (0.2, "trained", AFTER, report.after))
    for offset, label, color, found in bars_of:
        percent = [100 * share for share in found.named().values()]
        bars = retrieval.bar([i + offset for i in range(len(names))], percent, 0.38, color=color, label=label)
        retrieval.bar_label(bars, fmt="%.1f", padding=2)
    for line, (name, share) in zip(LINES, report.yardsticks.items(), strict=False):
        retrieval.axhline(100 * share, color="black", linestyle=line, linewidth=1, label=f"{name}: {share:.1%}")
    held_out = report.held_out
    judge = training_loss(report.options.loss).judge
    retrieval.set_title(judge.title.format(classes=held_out.classes, images=held_out.images, bits=report.options.bits))
    retrieval.set_ylabel("%")
    retrieval.set_ylim(0, 110)
    retrieval.set_yticks(range(0, 101, 20))
    shown = [fill(name, 11) for name in names]
    lines = max(name.count("\n") + 1 for name in shown)
    retrieval.set_xticks(range(len(names)), shown, fontsize="small")
    retrieval.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05 - 0.05 * lines), ncols=2, frameon=False)
    for axes in (loss, *tests, retrieval):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / NAME, dpi=120)

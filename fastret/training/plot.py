"""plot.png: the loss of every step, and retrieval of unseen classes before and after; needs matplotlib."""

from pathlib import Path

from fastret.training.report import Report

NAME = "plot.png"
BEFORE, AFTER = "#b8bec9", "#1f5fbf"


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
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, retrieval = figure.subplots(1, 2, width_ratios=(3, 2))

    steps = range(1, len(report.history) + 1)
    loss.plot(steps, report.history, color=AFTER, linewidth=1.5, marker="o" if len(report.history) == 1 else None)
    loss.set_yscale("log")
    loss.set_title(f"Training loss ({report.options.loss})")
    loss.set_xlabel("iteration")
    loss.set_ylabel("loss (log scale)")
    loss.grid(which="major", alpha=0.3)

    names = ("R@1", "R@10", "MAP@R")
    bars_of = ((-0.2, "untrained", BEFORE, report.before), (0.2, "trained", AFTER, report.after))
    for offset, label, color, found in bars_of:
        percent = [100 * found.recall_at_1, 100 * found.recall_at_10, 100 * found.map_at_r]
        bars = retrieval.bar([i + offset for i in range(len(names))], percent, 0.38, color=color, label=label)
        retrieval.bar_label(bars, fmt="%.1f", padding=2)
    retrieval.set_title(f"Retrieval of {report.held_out.classes:,} unseen classes")
    retrieval.set_ylabel("%")
    retrieval.set_ylim(0, 110)
    retrieval.set_yticks(range(0, 101, 20))
    retrieval.set_xticks(range(len(names)), names)
    retrieval.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    for axes in (loss, retrieval):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / NAME, dpi=120)

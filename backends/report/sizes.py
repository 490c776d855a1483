"""A picture of which sizes fit: peaks against the budget, and what a step does in a second."""

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...planner.ir.program import Kind
from ...planner.ir.units import show_bytes
from .pictures import COLOURS, INK, byte_ticks, dress, new_figure

if TYPE_CHECKING:
    from ...planner.ir.fit import Fit

BUDGET = "#b3261e"
UNPLANNED = "#d55e00"


def sizes(found: "Fit") -> Figure:
    """Peak over size, planned and unplanned, with the budget; below it tokens or samples a second of what fits."""
    figure = new_figure(7.0, 5.6)
    grid = figure.add_gridspec(2, 1, height_ratios=[3, 2])
    above = figure.add_subplot(grid[0])
    below = figure.add_subplot(grid[1], sharex=above)
    fitting = [point for point in found.points if point.fits]
    blue = COLOURS[Kind.GRADIENT]
    above.plot([point.size for point in fitting], [point.peak for point in fitting], color=blue, marker="o", markersize=4,
               label="planned")  # fmt: skip
    for point in found.points:
        if not point.fits:
            above.plot([point.size], [point.peak], color=blue, marker="x", linestyle="none", label="smallest known, too large")
    above.plot([point.size for point in found.points], [point.unplanned for point in found.points], color=UNPLANNED,
               marker="D", markersize=3, linewidth=0.8, linestyle=":", label="unplanned")  # fmt: skip
    above.axhline(found.budget, color=BUDGET, linestyle=(0, (5, 3)), linewidth=1.2, label=f"budget {show_bytes(found.budget)}")
    above.set_ylim(0, 2.0 * found.budget)  # what is far above the budget is of no interest
    above.set_yticks(byte_ticks(above.get_ylim()[1]))
    below.plot([point.size for point in fitting], [point.rate for point in fitting], color=blue, marker="o", markersize=4)
    below.set_ylim(bottom=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    dress(above, "{:.0f}".format, show_bytes)
    dress(below, "{:.0f}".format, "{:,.4g}".format)
    above.tick_params(labelbottom=False)
    above.set_ylabel("peak of device memory")
    below.set_ylabel(f"{found.unit} / s (predicted)")
    below.set_xlabel(found.over, color=INK)
    above.legend(loc="upper left", frameon=False, fontsize=8.5)
    title = f"{found.name} on {found.machine}: {found.over} {found.largest} fits"
    above.set_title(title, loc="left", fontsize=12, color=INK)
    return figure

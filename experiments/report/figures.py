"""Pictures for papers and slides, saved as PNG; what the page shows, the page draws itself."""

from __future__ import annotations

import collections.abc
import io
import typing

import numpy as np

from ldm_jax.evaluation.scaling_law import Law

INK, MUTED, GRID, ACCENT, SECOND = "#1b1f27", "#69707d", "#e3e6eb", "#2456c7", "#c2560c"
STYLE: dict[typing.Any, typing.Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelpad": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3.5,
    "legend.frameon": False,
}


def curve_picture(scores: dict[str, typing.Any]) -> bytes:
    """The performance-threshold curve with its bootstrap band and the conservative curve.

    Args:
      scores: contents of `scores.json`.

    Returns:
      The picture, as PNG.
    """
    return _picture(lambda axes: _draw_curve(axes, scores), (10.4, 4.8))


def scaling_picture(found: dict[str, typing.Any]) -> bytes:
    """Draws the held-out KL to the target against arithmetic, 6 N D: every run, and the fitted law of every size.

    Args:
      found: contents of `scaling.json`.

    Returns:
      The picture, as PNG.
    """
    return _picture(lambda axes: _draw_scaling(axes, found), (10.4, 5.2))


def count(value: float) -> str:
    """A large number in short: 943,104 is 0.943M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.5 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _draw_curve(axes: typing.Any, scores: dict[str, typing.Any]) -> None:
    points, admitted = scores["curve"], scores["admitted"]
    tau = [point["tau"] for point in points]
    low, count, high = ([point[name] for point in points] for name in ("low", "count", "high"))
    conservative = [point["count"] for point in scores["curve_conservative"]]
    percent = f"{100 * scores['confidence']:g} %"
    # A count holds from its threshold down to the one before it.
    axes.fill_between(tau, low, high, step="pre", color=ACCENT, alpha=0.16, linewidth=0, label=f"{percent} band")
    axes.step(tau, count, where="pre", color=ACCENT, linewidth=2.2, label="z ≥ τ")
    bound = f"lower {percent} bound of z ≥ τ"
    axes.step(tau, conservative, where="pre", color=SECOND, linewidth=1.4, linestyle=(0, (4, 2)), label=bound)
    top = max(admitted, 1)
    axes.axhline(admitted, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    said = f"{admitted} admitted of {scores['registered']} registered"
    axes.annotate(said, (1.2, admitted), (0, 5), textcoords="offset points", ha="right", color=MUTED, fontsize=9.5)
    for mark in (0.8, 1.0):
        if reached := next((point["count"] for point in points if point["tau"] == mark), None):
            axes.plot([mark], [reached], "o", color=ACCENT, markersize=5.5, clip_on=False)
            axes.vlines(mark, 0, reached, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(
                f"{reached}", (mark, reached), (7, 5), textcoords="offset points", color=INK, fontweight="bold"
            )
    axes.set(xlim=(0, 1.2), ylim=(0, top * 1.12), xlabel="threshold τ   (0 = random, 1 = reference)")
    axes.set_ylabel("environments")
    axes.set_xticks([tick / 10 for tick in range(0, 13, 2)])
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.02), handlelength=2.2)


def _draw_scaling(axes: typing.Any, found: dict[str, typing.Any]) -> None:
    law, points = Law(**found["law"]), found["points"]
    sizes = sorted({(point["parameters"], point["size"]) for point in points})
    for rank, (parameters, name) in enumerate(sizes):
        own = sorted((point["tokens"], point["held_out_kl"]) for point in points if point["size"] == name)
        tokens, losses = zip(*own, strict=True)
        shade = (rank + 1) / len(sizes)
        label = f"{name}, N = {count(parameters)}"
        axes.plot(
            [6 * parameters * d for d in tokens], losses, "o", color=ACCENT, alpha=0.25 + 0.75 * shade, label=label
        )
        line = np.geomspace(tokens[0], tokens[-1], 41)
        predicted = law.predict(np.array(parameters), line)
        axes.plot(6 * parameters * line, predicted, color=ACCENT, alpha=0.25 + 0.75 * shade, linewidth=1.4)
    ends = [6 * point["parameters"] * point["tokens"] for point in points]
    compute = np.geomspace(min(ends), max(ends), 41)
    if min(law.parameters_power, law.data_power, law.parameters, law.data) > 1e-6:
        best = np.asarray(law.best_size(compute))
        frontier = law.predict(best, compute / 6 / best)
        axes.plot(compute, frontier, color=SECOND, linewidth=1.4, linestyle=(0, (4, 2)), label="best size, by the law")
    axes.set(xscale="log", yscale="log", xlabel="floating-point operations, 6 N D")
    axes.set_ylabel("held-out KL to the target, nats")
    axes.legend(loc="upper right")


def _picture(draw: collections.abc.Callable[[typing.Any], None], size: tuple[float, float]) -> bytes:
    # Figure alone, without pyplot: nothing global is touched and no display is looked for.
    import matplotlib
    from matplotlib.figure import Figure

    target = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(target, format="png", dpi=180, facecolor="white")
    return target.getvalue()

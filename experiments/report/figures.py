"""The pictures of the report, drawn once and saved as PNG or as SVG that follows the page's light or dark theme."""

from __future__ import annotations

import collections.abc
import io
import math
import re
import typing

import numpy as np

from ldm_jax.evaluation.scaling_law import Law

INK, MUTED, GRID, ACCENT, SECOND = "#1b1f27", "#69707d", "#e3e6eb", "#2456c7", "#c2560c"
# The colours in the SVG become the page's variables, so that one drawing serves both themes.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", ACCENT: "--accent", SECOND: "--second"}
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
    # Text stays text, in the page's own font.
    "svg.fonttype": "none",
    # The same input gives the same bytes.
    "svg.hashsalt": "ldm_jax",
}
WIDTH = 220
"""Of the interval chart, in its own units."""
POINTS = 600
"""A line of more points than this is averaged down to so many."""


def curve_picture(scores: dict[str, typing.Any], kind: str) -> bytes:
    """The performance-threshold curve with its bootstrap band and the conservative curve.

    Args:
      scores: contents of `scores.json`.
      kind: `"png"` or `"svg"`.

    Returns:
      The picture.
    """
    return _picture(lambda axes: _draw_curve(axes, scores), (10.4, 4.8), kind)


def training_picture(rows: collections.abc.Sequence[dict[str, typing.Any]], kind: str) -> bytes:
    """Draws the loss and the KL to the target against tokens.

    Args:
      rows: each with `tokens` and any of `loss` and `kl`, in nats.
      kind: `"png"` or `"svg"`.

    Returns:
      The picture.
    """
    return _picture(lambda axes: _draw_training(axes, rows), (10.4, 3.8), kind)


def scaling_picture(found: dict[str, typing.Any], kind: str) -> bytes:
    """Draws the held-out KL to the target against arithmetic, 6 N D: every run, and the fitted law of every size.

    Args:
      found: contents of `scaling.json`.
      kind: `"png"` or `"svg"`.

    Returns:
      The picture.
    """
    return _picture(lambda axes: _draw_scaling(axes, found), (10.4, 5.2), kind)


def interval_chart(low: float | None, value: float, high: float | None, span: tuple[float, float], note: str) -> str:
    """One row of the interval chart: z as a dot on its interval, over guides at 0 and 1.

    Args:
      low: lower end of the interval; None if it has none.
      value: z.
      high: upper end; None if it has none.
      span: the z at the left and at the right edge; an arrow shows what lies beyond.
      note: shown under the pointer.

    Returns:
      An SVG element.
    """
    first = position(-math.inf if low is None else low, span)
    last = position(math.inf if high is None else high, span)
    at = position(value, span)
    marks = [
        f'<line class="guide" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="24"/>'
        for x in (position(z, span) for z in (0.0, 1.0))
    ]
    marks.append(f'<line class="whisker" x1="{first:.1f}" x2="{last:.1f}" y1="12" y2="12"/>')
    if span[0] <= value <= span[1]:
        marks.append(f'<circle class="dot" cx="{at:.1f}" cy="12" r="4.2"/>')
    else:
        back = at + 8 if value < span[0] else at - 8
        marks.append(f'<path class="dot" d="M{at:.1f} 12 L{back:.1f} 7 L{back:.1f} 17 Z"/>')
    return f'<svg class="z" viewBox="0 0 {WIDTH} 24" role="img"><title>{note}</title>{"".join(marks)}</svg>'


def axis(span: tuple[float, float]) -> str:
    """The scale above the interval chart, an SVG element."""
    ticks = "".join(f'<text x="{position(tick, span):.1f}" y="15">{tick:g}</text>' for tick in (0.0, 0.5, 1.0))
    return f'<svg class="z" viewBox="0 0 {WIDTH} 20" aria-hidden="true">{ticks}</svg>'


def position(z: float, span: tuple[float, float]) -> float:
    """Where z lies in the interval chart, kept inside it."""
    share = (min(max(z, span[0]), span[1]) - span[0]) / (span[1] - span[0])
    return 6 + share * (WIDTH - 12)


def count(value: float) -> str:
    """A large number in short: 943,104 is 0.943M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.5 * unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _finite(value: typing.Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(values: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(values) / POINTS)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


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


def _draw_training(axes: typing.Any, rows: collections.abc.Sequence[dict[str, typing.Any]]) -> None:
    for name, label, color in (("loss", "loss", MUTED), ("kl", "KL to the target", ACCENT)):
        values = [(row["tokens"], row[name]) for row in rows if _finite(row.get("tokens")) and _finite(row.get(name))]
        if values:
            x, y = zip(*_thin(values), strict=True)
            axes.plot(x, y, color=color, linewidth=1.8, solid_joinstyle="round", label=label)
            text = {"textcoords": "offset points", "va": "center", "fontsize": 9.5}
            axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), (6, 0), color=color, annotation_clip=False, **text)
    axes.set_xlabel("tokens (one per time step)")
    axes.set_ylabel("nats per action slot")
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.margins(x=0)
    if axes.get_lines():
        axes.legend(loc="upper right", ncols=2)


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


def _picture(draw: collections.abc.Callable[[typing.Any], None], size: tuple[float, float], kind: str) -> bytes:
    # Figure alone, without pyplot: nothing global is touched and no display is looked for.
    import matplotlib
    from matplotlib.figure import Figure

    target = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        if kind == "png":
            figure.savefig(target, format="png", dpi=180, facecolor="white")
            return target.getvalue()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _themed(target.getvalue().decode()).encode()


def _themed(text: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="figure" viewBox="\1" role="img">', text, count=1)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text

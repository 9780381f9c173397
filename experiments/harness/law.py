"""The law of a set of runs: fitted to what they measured, and shown."""

from __future__ import annotations

import typing

import numpy as np

from ldm_jax.evaluation import scaling_law


def fit_points(points: list[dict[str, typing.Any]]) -> dict[str, typing.Any]:
    """Fits the law to runs.

    Args:
      points: with `parameters`, `tokens` and `held_out_kl` of each.

    Returns:
      The law, what its constants are where one run is left out, and its error, as JSON values.

    Raises:
      ScalingError: a law cannot be fitted to them.
    """
    columns = [np.array([point[key] for point in points]) for key in ("parameters", "tokens", "held_out_kl")]
    law = scaling_law.fit(*columns)
    others = scaling_law.leave_one_out(*columns) if len(points) > 6 else [law]
    spread = {
        name: [min(values), max(values)] for name, values in zip(law._fields, zip(*others, strict=True), strict=True)
    }
    error = np.log(law.predict(*columns[:2]) / columns[2])
    return {"law": law._asdict(), "leave_one_out": spread, "rms_log_error": float(np.sqrt(np.mean(error**2)))}


def law_table(found: dict[str, typing.Any]) -> str:
    """Shows runs and their law.

    Args:
      found: `points`, and what `fit_points` made of them.

    Returns:
      Some lines of text.
    """
    law = scaling_law.Law(**found["law"])
    lines = [f"{'size':>10} {'N':>12} {'D':>12} {'held-out KL':>16} {'law':>8} {'z':>6}"]
    for point in found["points"]:
        n, d = point["parameters"], point["tokens"]
        told = f"{point['size']:>10} {n:12,} {d:12,} {point['held_out_kl']:16.4f} {law.predict(n, d):8.4f}"
        lines.append(f"{told} {point['z']:6.3f}" if "z" in point else told)
    spread = {name: f"{low:.3g} to {high:.3g}" for name, (low, high) in found["leave_one_out"].items()}
    return "\n".join(
        [
            *lines,
            f"KL = {law.floor:.4g} + {law.parameters:.4g} / N^{law.parameters_power:.3f}"
            f" + {law.data:.4g} / D^{law.data_power:.3f}, rms error of its logarithm {found['rms_log_error']:.3f}",
            f"without one run: floor {spread['floor']}, powers {spread['parameters_power']}; {spread['data_power']}",
        ]
    )

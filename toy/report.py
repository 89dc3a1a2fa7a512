"""The numbers of a check as text."""

from __future__ import annotations

from typing import Any


def tables(result: dict[str, Any]) -> str:
    """Tables of a report of `toy.check.report`."""
    rows = result["posterior"]
    sigmas = sorted({row["sigma"] for row in rows})
    lines = [f"{result['points']} observations per noise level, {result['samples']} draws for each"]
    measures = {
        "energy_ratio": "energy distance to the true posterior, over that of two sets of true draws",
        "sliced_ratio": "sliced Wasserstein distance, likewise",
        "spread_ratio": "spread of the draws over the truth's (below 1: collapse)",
        "mode_error": "error of the mode weights (half the sum of absolute differences)",
    }
    for measure, title in measures.items():
        lines += ["", title, f"{'sigma':24}" + "".join(f"{sigma:>9g}" for sigma in sigmas)]
        cells: dict[str, list[str]] = {}
        for row in rows:
            name = row["sampler"] + ("" if row["zeta"] is None else f", zeta {row['zeta']:g}")
            cells.setdefault(name, []).append(f"{row[measure]:9.3f}")
        lines += [f"{name:24}" + "".join(values) for name, values in cells.items()]
    lines += ["", f"one noisy coordinate observed {'':10} energy ratio   spread"]
    lines += [f"{r['denoiser']:40}{r['energy_ratio']:12.2f}{r['spread_ratio']:9.3f}" for r in result["pnp"]]
    lines += ["", f"{'target':60} {'worst':>10} {'limit':>8}"]
    for row in result["targets"]:
        lines.append(f"{row['target']:60} {row['worst']:10.3g} {row['limit']:8g}  {'met' if row['met'] else 'missed'}")
    return "\n".join(lines)

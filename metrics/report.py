"""Reports of metrics: what is recorded beside the numbers, and the table that people read."""

from __future__ import annotations

import os
from typing import Any

from dnnlib.files import write_json
from metrics.compute import MetricValue
from metrics.references import Reference

PIXEL_ROUNDING = {  # by the name of the encoder that turns a network's output x into uint8
    "rgb": "clip(127.5*x + 128, 0, 255), truncated",
    "sd-vae": "255*clip(x, 0, 1), truncated, of the autoencoder's output x",
}


def describe(num_images: int, reference: Reference, values: list[MetricValue], warnings: list[str]) -> dict[str, Any]:
    """The part of a record that all reports share, as JSON data."""
    return {
        "num_images": num_images,
        "reference": {
            "source": reference.source,
            "sha256": reference.sha256,
            "num_images": reference.num_images,
        },
        "metrics": [value.to_dict() for value in values],
        "warnings": warnings,
    }


def write_report(path: str | os.PathLike[str], records: list[dict[str, Any]]) -> None:
    """Write the records as JSON, whole or not at all."""
    write_json(path, {"results": records})


def format_table(records: list[dict[str, Any]]) -> str:
    """Table of a report: one line per record, one column per number."""
    head, rows = [], []
    for record in records:
        row = {}
        if "sampler" in record:
            ts = record["ts"]
            few_step = ",".join(map(str, ts)) if ts else "1 direct step"
            row["setting"] = few_step if record["sampler"] == "few-step" else "heun"
            row["NFE"] = str(record["evaluations"])
        row["images"] = str(record["num_images"])
        for metric in record["metrics"]:
            name = metric["name"].replace("pr", "precision", 1) if "recall" in metric["details"] else metric["name"]
            row[name] = f"{metric['value']:.4g}"
            if "recall" in metric["details"]:
                row[metric["name"].replace("pr", "recall", 1)] = f"{metric['details']['recall']:.4g}"
        if "sampling_ms_per_image" in record:
            row["ms/image"] = f"{record['sampling_ms_per_image']:.2f}"
        head = list(row)
        rows.append(list(row.values()))
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [head, *rows])

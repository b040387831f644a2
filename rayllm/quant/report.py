"""What a conversion did, as files beside the weights: numbers for programs, a picture for people."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayllm.quant.convert import Report

NUMBERS, PICTURE = "quantization_report.json", "weight_ranges.png"


def as_json(report: Report) -> dict[str, Any]:
    recipe = asdict(report.recipe) | {"skip": list(report.recipe.skip)}
    worst = max(report.layers, key=lambda layer: layer.error)
    return {
        **recipe,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "calibration_tokens": report.calibration_tokens,
        "error_of": "outputs" if report.calibration_tokens else "weights",
        "mean_error": sum(layer.error for layer in report.layers) / len(report.layers),
        "worst_layer": worst.name,
        "worst_error": worst.error,
        "layers": [asdict(layer) for layer in report.layers],
    }


def write_report(report: Report, directory: Path) -> None:
    (directory / NUMBERS).write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    _draw(report, directory / PICTURE)


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure  # the only user of it

    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    numbers = range(len(report.layers))
    upper.plot(numbers, [layer.range for layer in report.layers], label="largest weight")
    upper.plot(numbers, [layer.kept_range for layer in report.layers], label="largest weight that int8 holds")
    upper.set_yscale("log")
    upper.set_ylabel("weight range")
    upper.legend()
    lower.bar(numbers, [100 * layer.error for layer in report.layers])
    of = "outputs" if report.calibration_tokens else "weights"
    lower.set_ylabel(f"error of {of}, %")
    lower.set_xlabel("linear layers in the order of the model")
    figure.suptitle(f"{report.recipe.scheme}, outliers {report.recipe.outliers}")
    figure.savefig(path, dpi=110)

"""What a run began with and has to go on with, as a small file in its folder."""

import json
from collections.abc import Mapping
from pathlib import Path

from rayllm.core.errors import DataError


def write_origin(run: Path, name: str, values: Mapping[str, object]) -> None:
    """Complete or as it was."""
    run.mkdir(parents=True, exist_ok=True)
    unfinished = run / f"{name}.tmp"
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(run / name)


def refuse_other_origin(run: Path, name: str, values: Mapping[str, object]) -> None:
    """DataError that names what is not as the run has it in file `name`."""
    try:
        found = json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{run / name}: does not say what the run began with: {error}") from None
    others = " and ".join(key.replace("_", " ") for key, value in values.items() if found.get(key) != value)
    if others:
        raise DataError(
            f"{run}: the run began with another {others}; go on with what it began with, or give `run` another folder"
        )

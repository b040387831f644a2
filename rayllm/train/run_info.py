"""What a run says of itself before its first step: `run.json` in its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from rayllm.core.errors import DataError
from rayllm.train.config import TrainConfig

_NAME = "run.json"


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`config`: a `TrainConfig` as plain values, of the run's latest start; who shows it need not know each setting."""

    recipe: str
    config: Mapping[str, Any]


def write_run_info(config: TrainConfig, recipe: str) -> None:
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    info = RunInfo(recipe=recipe, config=msgspec.to_builtins(config))
    staging = run / f".{_NAME}.partial"
    staging.write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")
    staging.replace(run / _NAME)


def read_run_info(run: Path) -> RunInfo:
    """DataError where there is no run."""
    if not run.is_dir():
        raise DataError(f"{run}: no such folder; give the one that `run` in the configuration names")
    path = run / _NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunInfo)
    except FileNotFoundError:
        raise DataError(
            f"{run}: holds no run of `rayllm train` that has begun ({_NAME} is missing);"
            " give the folder that `run` in the configuration names"
        ) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise DataError(f"{path}: is not what `rayllm train` writes: {error}") from None

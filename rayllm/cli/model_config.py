"""A model's shape from its config.json, for the commands that load no weights and download nothing."""

import json
from pathlib import Path
from typing import Any

from rayllm.core.errors import CheckpointError
from rayllm.models.embedded import EMBEDDED
from rayllm.models.families import spec_from_config
from rayllm.models.spec import DecoderSpec


def read_spec(model: str) -> DecoderSpec:
    """As `read_config`; raises ConfigError for a model that is not supported."""
    return spec_from_config(read_config(model))


def read_config(model: str) -> dict[str, Any]:
    """`model`: a directory, or the name of an embedded model that was fetched.

    Raises CheckpointError for a config.json that cannot be read.
    """
    directory = EMBEDDED[model].directory if model in EMBEDDED else Path(model)
    if not directory.is_dir():
        fetchable = directory.is_file() or model in EMBEDDED or not model.startswith(("/", ".", "~"))
        hint = f"; get it with `rayllm models fetch {model}`" if fetchable else ""
        raise CheckpointError(model, f"is not a directory here{hint}")
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, error.strerror or "cannot be read") from None
    except ValueError as error:
        raise CheckpointError(path, f"not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(path, "must hold a JSON object")
    return config

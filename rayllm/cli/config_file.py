"""The configuration in a file: TOML, with a table for each part of `EngineConfig` and one for `ServeConfig`, or the
YAML that Ray Serve deploys (`serve deploy`, a RayService's `serveConfigV2`), whose application has the same as `args`.

[model]
model = "smollm2-135m"
dtype = "bfloat16"

[parallel]
tensor = 3

[cache]
cpu_memory_bytes = 1073741824

[scheduler]
max_num_seqs = 64

[serve]
http_port = 8000
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rayllm.core.errors import ConfigError
from rayllm.serve.settings import Sections, check_name, check_sections, engine_config, serve_config

__all__ = ["Sections", "engine_config", "merge", "read_config", "serve_config"]

_IMPORT_PATH: Final = "rayllm.serve.app:from_settings"


def read_config(path: Path) -> Sections:
    """The file's tables, names checked, values not yet. Raises ConfigError that names the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            return _serve_yaml(str(path), text)
        return check_sections(str(path), tomllib.loads(text))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def _serve_yaml(where: str, text: str) -> Sections:
    """Of a file for Ray Serve: its one application's settings and its ports. Ray ignores what it does not know; this
    does not."""
    import yaml

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not a YAML file: {error}") from None
    top = _table(where, "the file", document, {"proxy_location", "http_options", "grpc_options", "applications"})
    http = _table(where, "http_options", top.get("http_options", {}), {"host", "port"})
    grpc_keys = {"port", "grpc_servicer_functions", "enable_reflection"}
    grpc = _table(where, "grpc_options", top.get("grpc_options", {}), grpc_keys)
    applications = top.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError(f"{where}: applications: must be a list of one")
    keys = {"name", "route_prefix", "import_path", "args"}
    application = _table(where, "applications[0]", applications[0], keys)
    if application.get("import_path") != _IMPORT_PATH:
        raise ConfigError(f"{where}: applications[0].import_path: must be {_IMPORT_PATH}")
    sections = check_sections(f"{where}: applications[0].args", _table(where, "args", application.get("args", {})))
    ports = {"http_port": http.get("port"), "grpc_port": grpc.get("port")}
    return merge(sections, {"serve": ports})


def _table(where: str, name: str, value: Any, keys: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name}: must be a mapping")
    for key in value if keys is not None else ():
        check_name(where, str(key), sorted(keys or ()))
    return value


def merge(file: Sections, given: Sections) -> Sections:
    """What is given on the command line (not None) wins over the file."""
    return {
        section: file.get(section, {})
        | {name: value for name, value in given.get(section, {}).items() if value is not None}
        for section in {*file, *given}
    }

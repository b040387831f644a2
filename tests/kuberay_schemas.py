"""KubeRay's own schemas, closed: a field that they do not know is an error, as it is not for the API server.

The CRDs are looked for in $KUBERAY_CRDS and in shared/kuberay beside the checkout or above it
(`ray.io_*.yaml`, of ray-operator/config/crd/bases in KubeRay's repository).
"""

import os
from pathlib import Path
from typing import Any

import jsonschema
import yaml

PRESERVE = "x-kubernetes-preserve-unknown-fields"


def directory() -> Path | None:
    places = [Path(os.environ["KUBERAY_CRDS"])] if "KUBERAY_CRDS" in os.environ else []
    places += [parent / "shared/kuberay" for parent in Path(__file__).resolve().parents]
    return next((place for place in places if any(place.glob("ray.io_*.yaml"))), None)


def problems(document: dict[str, Any], crds: Path) -> list[str]:
    """Of an object of a kind that the CRDs define."""
    for path in crds.glob("ray.io_*.yaml"):
        crd = yaml.safe_load(path.read_text())["spec"]
        if crd["names"]["kind"] == document["kind"]:
            version = next(v for v in crd["versions"] if document["apiVersion"] == f"{crd['group']}/{v['name']}")
            schema = _closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
            return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]
    raise LookupError(f"no CRD defines {document['kind']}")


def _closed(schema: Any) -> Any:
    """As the API server reads it (defaults are filled in first, so nothing that has one is missing), and strict."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        schema = {key: value for key, value in schema.items() if key != "anyOf"} | {"type": ["integer", "string"]}
    properties = schema.get("properties")
    if not isinstance(properties, dict) or "type" not in schema:
        return schema
    if isinstance(schema.get("required"), list):
        schema["required"] = [name for name in schema["required"] if "default" not in properties.get(name, {})]
    if "additionalProperties" not in schema and not schema.get(PRESERVE):
        schema["additionalProperties"] = False
    return schema

"""What a figure was measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions(*packages: str) -> dict[str, str]:
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    found = {package: installed_version(package) for package in ("rayllm", *packages)}
    return {"python": platform.python_version(), "machine": machine, **found}

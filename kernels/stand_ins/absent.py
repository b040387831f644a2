"""In the place of numba and llvmlite on a machine that lacks them, for `kernels/gpu.py` alone.

`rayllm_kernels` names its CPU loops when it is imported. With these it can be imported where only the GPU kernels are
to run; to run a loop is an error.
"""

from typing import Any


class _Base:
    def __init__(self, *_arguments: object, **_keywords: object) -> None:
        pass


class Absent:
    """Whatever is asked of it; called, subscripted or inherited from, it stays what it is."""

    address = None  # of what numba would have compiled

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()

    def __call__(self, *_arguments: object, **_keywords: object) -> "Absent":
        return Absent()

    def __getitem__(self, _key: object) -> "Absent":
        return Absent()

    def __mro_entries__(self, _bases: object) -> tuple[type]:
        return (_Base,)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name == "cfunc":
        raise ModuleNotFoundError("numba is not installed here, and a loop on CPU needs it (pip install numba)")
    return Absent()

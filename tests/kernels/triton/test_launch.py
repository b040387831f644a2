"""Where kernels are launched: in one place, which enters the device of the tensors.

Tensors of a second GPU are fake ones: they have a device and no memory, which is all that the choice looks at.
"""

import ast
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rayllm_kernels import gpu
from rayllm_kernels.gpu.launch import device_of


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_is_that_of_the_tensors(index: int) -> None:
    with FakeTensorMode():
        x = torch.empty(3, device=f"cuda:{index}")
    assert device_of((x, None, 3)).idx == index
    assert device_of((None, 1e-5, x)).idx == index


def test_on_cpu_no_device_is_entered() -> None:
    with device_of((torch.zeros(3), 3)) as entered:
        assert entered is None
    assert device_of((torch.zeros(3), 3)).idx == -1


def launches(source: str) -> list[int]:
    """The lines that say `something[grid](...)`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]


def test_every_launch_passes_through_one_place() -> None:
    assert launches("f(x)\nkernel[(1,)](x)\nkernel[grid](x, y=1)\n") == [2, 3]
    found = {
        path.name: len(launches(path.read_text())) for folder in gpu.__path__ for path in Path(folder).glob("*.py")
    }
    assert len(found) > 10
    assert {name: count for name, count in found.items() if count} == {"launch.py": 1}

"""Compile every shipped configuration of every Triton kernel for sm_90 (H100, H200); no GPU is needed.

    python kernels/compile_report.py            write kernels/compile_report_3.7.json, by the version of triton
    python kernels/compile_report.py --check    compare with it instead; what `make test` does

Either fails where a configuration does not compile, spills registers, needs more shared memory than a block has, or
lacks an instruction that its `Spec` expects. The figures depend on the version of triton, so there is a report for each
that is supported: the one pinned here, and the one that GPU machines have (`make kernels-check-3.6`).
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from rayllm_kernels import gpu
from rayllm_kernels.gpu.spec import Spec

REPORT = Path(__file__).with_name(f"compile_report_{'.'.join(triton.__version__.split('.')[:2])}.json")
SHARED_LIMIT = 227 * 1024  # bytes that a block of sm_90 may have
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "igmma": r"wgmma\.mma_async\S*\.s32\.[su]8",
    "tma": r"cp\.async\.bulk\.tensor",
    "setmaxnreg": r"setmaxnreg",
}

Figures = dict[str, int]


def find_specs() -> list[tuple[str, int, str]]:
    """-> (module, index in its SPECS, name) of everything that is shipped."""
    found = []
    for module in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}."):
        specs: list[Spec] = getattr(importlib.import_module(module.name), "SPECS", [])
        found += [(module.name, i, spec.name) for i, spec in enumerate(specs)]
    repeated = {name for _, _, name in found if sum(name == other for _, _, other in found) > 1}
    if repeated:
        raise ValueError(f"specs share a name: {', '.join(sorted(repeated))}")
    return found


def compile_spec(spec: Spec) -> Figures:
    names = spec.kernel.arg_names
    types = {name: "constexpr" if name in spec.constexprs else spec.signature.get(name) for name in names}
    unknown = ({*spec.signature, *spec.constexprs, *spec.aligned} - {*names}) | {n for n in names if types[n] is None}
    if unknown:
        raise ValueError(f"the spec and the kernel's arguments differ: {', '.join(sorted(unknown))}")
    source = ASTSource(
        spec.kernel,
        types,
        {(names.index(name),): value for name, value in spec.constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    counts = {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()}
    return {
        "registers": int(found[1]),
        "spill_bytes": int(found[2]),
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    } | {name: count for name, count in counts.items() if count}


def problems_of(spec: Spec, figures: Figures) -> list[str]:
    problems = []
    if figures["spill_bytes"]:
        problems.append(f"spills {figures['spill_bytes']} bytes of registers a thread")
    if figures["shared_bytes"] > SHARED_LIMIT:
        problems.append(f"needs {figures['shared_bytes']} bytes of shared memory, of which a block has {SHARED_LIMIT}")
    problems += [f"contains no {name}" for name in sorted(spec.expects) if not figures.get(name)]
    return problems


def examine(task: tuple[str, int, str]) -> tuple[str, Figures, list[str]]:
    """-> (name, figures, problems), in a process of the pool."""
    module, index, name = task
    spec: Spec = importlib.import_module(module).SPECS[index]
    try:
        figures = compile_spec(spec)
    except (TritonError, RuntimeError, ValueError) as error:
        return name, {}, [f"does not compile: {type(error).__name__}: {error}"]
    return name, figures, problems_of(spec, figures)


def differences(committed: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Where the report on disk does not say what was found just now."""
    if committed["triton"] != made["triton"]:
        return [f"{REPORT.name} is of triton {committed['triton']}, this is {made['triton']}"]
    old, new = committed["kernels"], made["kernels"]
    return [
        f"{name}: {old.get(name, 'not in the report')} -> {new.get(name, 'no longer shipped')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed report; write nothing")
    arguments = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    begin = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(examine, find_specs()))
    failures = [f"{name}: {problem}" for name, _, problems in results for problem in problems]
    made = {"triton": triton.__version__, "target": "sm_90", "kernels": {name: f for name, f, _ in sorted(results)}}
    if arguments.check:
        if not REPORT.exists():
            parser.error(f"no report for triton {triton.__version__}: kernels/{REPORT.name} is not there")
        changed = differences(json.loads(REPORT.read_text()), made)
        failures += changed
        if changed:
            failures.append("if that is meant, run: python kernels/compile_report.py")
    elif not failures:
        lines = [f"    {json.dumps(name)}: {json.dumps(figures)}" for name, figures in made["kernels"].items()]
        head = f'{{\n  "triton": "{made["triton"]}",\n  "target": "{made["target"]}",\n  "kernels": {{\n'
        REPORT.write_text(head + ",\n".join(lines) + "\n  }\n}\n")
    print(f"{len(results)} configurations for sm_90, triton {triton.__version__}, {time.perf_counter() - begin:.0f} s")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

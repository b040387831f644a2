"""Serve and run language models on Ray. `LLM` and `SamplingParams` are what offline use needs.

Both are loaded when they are first asked for: importing rayllm itself imports nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayllm.core.types import SamplingParams
    from rayllm.engine.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    match name:
        case "LLM":
            from rayllm.engine.llm import LLM

            return LLM
        case "SamplingParams":
            from rayllm.core.types import SamplingParams

            return SamplingParams
    raise AttributeError(f"module 'rayllm' has no attribute {name!r}")

"""A span for each generation, inside the one that Ray Serve opens for the request.

Serve sets OpenTelemetry up when it is told to trace (RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH); without that, spans are
no-ops. Names follow OpenTelemetry's conventions for generative AI. Prompts and answers are never recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode

from rayllm.core.errors import RayLLMError

if TYPE_CHECKING:
    from rayllm.serve.service import Generation

__all__ = ["Span", "generation_span"]

_tracer = trace.get_tracer("rayllm")


@contextmanager
def generation_span(generation: "Generation") -> Iterator[Span]:
    """Not the current span: it lives through an asynchronous generator, whose steps may run in different contexts."""
    call, usage = generation.call, generation.usage
    span = _tracer.start_span("generate", attributes={"gen_ai.operation.name": "text_completion"})
    try:
        yield span
    except RayLLMError as error:
        span.set_attribute("error.type", error.code)
        span.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        if span.is_recording():
            span.set_attributes(
                {
                    "gen_ai.request.model": call.model,
                    "gen_ai.request.max_tokens": call.params.max_tokens or 0,
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "rayllm.cached_tokens": usage.cached_tokens,
                    "rayllm.face": call.face,
                    "rayllm.request_id": call.request_id,
                    "rayllm.weight_version": generation.weight_version,
                }
            )
        span.end()

"""Python client of the gRPC API.

    with Client("localhost:9000") as client:
        print(client.generate("Once upon a time", SamplingParams(max_tokens=32)).outputs[0].text)

`AsyncClient` has the same methods as coroutines. Errors are those of `rayllm.core.errors`.
"""

from rayllm.client.async_client import AsyncClient
from rayllm.client.sync_client import Client
from rayllm.client.types import Chunk, Generation, Load, ModelInfo, Usage

__all__ = ["AsyncClient", "Chunk", "Client", "Generation", "Load", "ModelInfo", "Usage"]

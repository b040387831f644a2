"""What the routes that change weights refuse before anything is changed."""

import httpx
import pytest

from rayllm.serve.admin_api import AdminFace
from rayllm.serve.admin_key import VARIABLE
from rayllm.serve.openai_api import build_http_app

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("gate", "problem"), [("a\0b", "gate: holds a NUL character at position 1"), (" \n", "gate: holds no text")]
)
async def test_a_gate_that_cannot_be_scored(server, monkeypatch, gate: str, problem: str):
    monkeypatch.setenv(VARIABLE, "key")
    app = build_http_app(server.service, admin=AdminFace(server.service, None))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica") as client:
        headers = {"authorization": "Bearer key"}
        body = {"checkpoint": "/no/such", "gate": gate}
        response = await client.post("/admin/promote", json=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == problem

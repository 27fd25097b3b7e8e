"""An OpenAI-compatible server that answers each user's input with turns that a test wrote."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Turn = str | list[tuple[str, dict[str, Any]]]


class LightServer:
    """Answers by the last user message and the number of assistant messages since.

    Args:
        turns: the turns of each input; other inputs get a text.
        delay_s: how long each answer takes.
        failures: the status of the first requests, in order, before answers begin; None for one that is answered.
    """

    def __init__(
        self,
        turns: Mapping[str, Sequence[Turn]],
        delay_s: float = 0.0,
        failures: Sequence[tuple[int, str] | None] = (),
    ) -> None:
        self.turns = turns
        self.delay_s = delay_s
        self.failures = list(failures)
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.most_running = 0
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.running -= 1
        if self.failures and (failure := self.failures.pop(0)) is not None:
            status, said = failure
            return JSONResponse({"error": {"message": said}}, status)
        if body.get("stream"):
            return StreamingResponse(_stream(), media_type="text/event-stream")
        users = [index for index, message in enumerate(body["messages"]) if message["role"] == "user"]
        earlier = [m for m in body["messages"][users[-1] :] if m["role"] == "assistant"]
        turns = self.turns.get(body["messages"][users[-1]]["content"], ["All right."])
        turn = turns[min(len(earlier), len(turns) - 1)]
        message: dict[str, Any] = {"role": "assistant", "content": turn if isinstance(turn, str) else None}
        if not isinstance(turn, str):
            message["tool_calls"] = [
                {"id": f"c{len(earlier)}_{i}", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
                for i, (n, a) in enumerate(turn)
            ]
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


async def _stream() -> AsyncIterator[str]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": "A"}, "finish_reason": None}
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"

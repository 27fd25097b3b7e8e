"""An OpenAI-compatible server that answers from a script and remembers the exact bytes that it was asked."""

import json
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Calls = list[dict[str, Any]]
Turn = str | Calls | tuple[str, Calls]


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    """Returns a tool call for :class:`ScriptedServer`."""
    return {"name": tool, "arguments": json.dumps(arguments)}


class ScriptedServer:
    """Answers each request with the next turn of a script.

    Args:
        turns: what the model says: a text, a list of calls, or both.
        digest: the digest that the gateway would name.
        call_id: the pattern of the calls' ids, of the answer's number and the call's; None leaves them out.
    """

    def __init__(self, *turns: Turn, digest: str = "digest-1", call_id: str | None = "call_{}_{}") -> None:
        self._turns = list(turns)
        self._digest = digest
        self._call_id = call_id
        self.bodies: list[bytes] = []
        self.app = Starlette(routes=[Route("/v1/chat/completions", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> Response:
        self.bodies.append(await request.body())
        if not self._turns:
            return JSONResponse({"error": {"message": "the script is at its end"}}, 400)
        turn = self._turns.pop(0)
        number = len(self.bodies)
        text, calls = turn if isinstance(turn, tuple) else (turn, []) if isinstance(turn, str) else (None, turn)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {"id": self._call_id and self._call_id.format(number, index), "type": "function", "function": function}
                for index, function in enumerate(calls)
            ]
        reason = "tool_calls" if calls else "stop" if text else "length"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        body = {"id": f"c{number}", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        # In ASCII, so that a turn may hold half a character.
        return Response(json.dumps(body), headers={"x-model-digest": self._digest}, media_type="application/json")

    def body(self, index: int = 0) -> dict[str, Any]:
        """Returns a request's body, parsed."""
        parsed: dict[str, Any] = json.loads(self.bodies[index])
        return parsed

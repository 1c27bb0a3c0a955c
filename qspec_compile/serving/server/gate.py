"""What stands before the endpoints: API keys, the size of bodies, and no new work for a server that shuts down."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

# Larger bodies are refused, unread.
MOST_BYTES = 16 * 2**20
_TOO_LARGE = f"the body has more than {MOST_BYTES} bytes"
_PROTECTED = "/v1/"
_SCHEME = b"Bearer "


class Gate:
    """Lets requests through to ``app``.

    Attributes:
        active: requests that are being answered.
        is_draining: whether no new ones are let through.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        """Without ``api_keys`` anybody is let in."""
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self.active = 0
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as ASGI has it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope["state"] = {**scope.get("state", {}), "is_draining": self.is_draining}
        if not scope["path"].startswith(_PROTECTED):
            return await self._app(scope, receive, send)
        self.active += 1
        try:
            scope["state"]["tenant"] = self._tenant(scope)
            if self.is_draining:
                raise ApiError(503, "the server is shutting down", "shutting_down")
            await self._app(scope, _limited(scope, receive), send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        finally:
            self.active -= 1

    def _tenant(self, scope: Scope) -> str:
        """Who asks: only requests of one tenant share cached prompts."""
        if not self._keys:
            return ""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        key = given.removeprefix(_SCHEME)
        # Every key is compared to its end, so that the time tells nothing.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        if not given.startswith(_SCHEME) or not any(matches):
            raise ApiError(
                401, "the API key is missing or wrong: pass it as `Authorization: Bearer KEY`", "invalid_api_key"
            )
        return hashlib.sha256(key).hexdigest()


def _limited(scope: Scope, receive: Receive) -> Receive:
    """``receive``, which refuses a body that is too large."""
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    # The HTTP server has checked that it is a number.
    if int(announced) > MOST_BYTES:
        raise ApiError(413, _TOO_LARGE)
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MOST_BYTES:
            # FastAPI lets no other error pass while it reads a body.
            raise HTTPException(413, _TOO_LARGE)
        return message

    return limited

"""Errors as OpenAI's protocol gives them."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from openai.types.shared import ErrorObject
from pydantic import BaseModel


class ErrorBody(BaseModel):
    """What the body of every response with a status of 400 and above looks like."""

    error: ErrorObject


# OpenAI's `type` of an error, where it is not the caller's fault alone.
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """A request that is answered with an error; ``param`` names what of it is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        # What it repeats of a request may have lone surrogates, which no answer can be written with.
        message = message.encode(errors="replace").decode()
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(
            error=ErrorObject(message=message, type=_TYPES.get(status, "invalid_request_error"), param=param, code=code)
        )

    def response(self) -> JSONResponse:
        """The answer; of a server that is busy, with the seconds after which another try may do."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body.model_dump(exclude_unset=True), self.status, headers)

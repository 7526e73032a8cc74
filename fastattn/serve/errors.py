"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from fastattn.data import DataError
from fastattn.serve.engine.requests import UNLOGGED, DeadlineError, Overloaded

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
RETRY_AFTER = "1"  # seconds, of a server whose queue is full


class ApiError(Exception):
    """What a client is told, with the status of the response."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The object that the response holds."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": RETRY_AFTER} if self.status in (429, 503) else {}


def of_exception(error: Exception) -> ApiError:
    """What a client is told of an error in the engine or of a value that it refuses."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        closing = "shutting down" in str(error)
        return ApiError(
            503 if closing else 429, str(error), code="shutting_down" if closing else "queue_full"
        )
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), code="deadline")
    if isinstance(error, (TypeError, ValueError)):
        message = str(error)
        name = message.split(":", 1)[0]
        return ApiError(400, message, param=name if name.isidentifier() else None)
    return ApiError(500, "the server failed; its log says why")


def of_failure(error: Exception) -> ApiError:
    """What a client is told of an error while its request ran: what it asked for was checked before, so that a value
    that is wrong now is the model's or the server's, unless it is a DataError of the client's texts."""
    known = isinstance(error, (ApiError, DataError, *UNLOGGED))
    return of_exception(error if known else RuntimeError())

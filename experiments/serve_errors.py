"""What a server says where it cannot do what is asked, in the form that OpenAI's clients read."""

from typing import Any

from moe.errors import InputError
from moe.requests import QueueFullError


class ApiError(Exception):
    """A request that is refused.

    Args:
        message: what was required, what was received, what to do.
        status: of the answer.
        param: the field at fault.
        code: a word for programs.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Returns the JSON of the answer."""
        kinds = {401: 'authentication_error', 429: 'rate_limit_error'}
        default = 'server_error' if self.status >= 500 else 'invalid_request_error'
        return {
            'error': {
                'message': str(self),
                'type': kinds.get(self.status, default),
                'param': self.param,
                'code': self.code,
            }
        }


def as_api_error(error: Exception) -> ApiError:
    """Turns what a library refuses into an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(str(error), 429, code='queue_full')
    if isinstance(error, InputError):
        return ApiError(str(error))
    return ApiError('The server failed; its log says how.', 500)

"""What the Hugging Face hub's client raises, and how to say it in a line."""

from json import JSONDecodeError

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of the HTTP library that the client is built on, httpx or httpx2 by its version."""
FETCH_ERRORS: tuple[type[Exception], ...] = (
    HTTP_ERROR, EntryNotFoundError, HFValidationError, OSError, JSONDecodeError
)  # fmt: skip
"""Of a download: no such thing, no access, no connection, a proxy's page in the answer's place."""


def tell_reason(error: BaseException) -> str:
    """Return the first line of what an error says, its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

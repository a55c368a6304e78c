"""A file -> the token that a client sends.

The file is TorchServe's own key_file.json, or holds a token and nothing else. Knows nothing of HTTP. A token never stands in a
message, on a command line or in a log.
"""

import contextlib
import json
from datetime import datetime
from pathlib import Path


class CredentialsError(RuntimeError):
    """The file holds no token; the message says why, for a person."""


def read_token(file: Path, role: str = "inference") -> str:
    """Read a token.

    Args:
        file: TorchServe's key_file.json, or a plain token.
        role: of the tokens in key_file.json, "inference", "management" or "API" (which renews the other two).
    Raises:
        CredentialsError: the file cannot be read, or holds no token.
    """
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise CredentialsError(f"{file}: {error.strerror}") from error
    token: object = text.strip()
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a plain token is not a JSON object
        token = json.loads(text)[role]["key"]
    if not (isinstance(token, str) and token.isascii() and token.isprintable() and token and " " not in token):
        raise CredentialsError(f"{file} holds no token: expected TorchServe's key_file.json or one line of printable ASCII")
    return token


def read_expiration(file: Path, role: str = "inference") -> float:
    """Read when a token of TorchServe's key_file.json expires, in seconds since 1970; 0 where the file does not say."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return datetime.fromisoformat(json.loads(file.read_text())[role]["expiration time"]).timestamp()
    return 0.0


def authorization(token: str | None) -> dict[str, str]:
    """Make the request header that carries a token; none where there is no token."""
    return {"Authorization": f"Bearer {token}"} if token else {}

"""The token that a client sends, read from a file.

Takes TorchServe's own key_file.json, or a file that holds a token and nothing else. Knows nothing of HTTP. A token never stands
in a message, on a command line or in a log.
"""

import contextlib
import json
from pathlib import Path


class CredentialsError(RuntimeError):
    """There is no token to send; the message says why, for a person."""


def read_token(file: Path, role: str = "inference") -> str:
    """Read a token.

    Args:
        file: TorchServe's key_file.json, or a plain token.
        role: which of key_file.json's: "inference", "management" or "API" (which renews the other two).
    Raises:
        CredentialsError: the file cannot be read, or holds no token.
    """
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise CredentialsError(f"{file}: {error.strerror}") from error
    token: object = text.strip()
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a plain token is no JSON, or no object
        token = json.loads(text)[role]["key"]
    if not (isinstance(token, str) and token.isascii() and token.isprintable() and token and " " not in token):
        raise CredentialsError(f"{file} holds no token: neither TorchServe's key_file.json nor one line of printable ASCII")
    return token


def authorization(token: str | None) -> dict[str, str]:
    """The request header that carries a token; none where there is no token."""
    return {"Authorization": f"Bearer {token}"} if token else {}

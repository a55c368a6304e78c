"""Tokens, read from files."""

import json
from pathlib import Path

import pytest

from scripts.serving.credentials import CredentialsError, authorization, read_expiration, read_token

KEYS = {  # as TorchServe writes them
    "management": {"key": "DpBNio8p", "expiration time": "2026-12-24T21:44:47.331211703Z"},
    "inference": {"key": "oHo-yVm_", "expiration time": "2026-12-24T21:44:47.331200967Z"},
    "API": {"key": "Pp-HdQVr"},
}


@pytest.mark.parametrize("role", list(KEYS))
def test_token_of_a_role_is_found_in_torchserves_file(role: str, tmp_path: Path) -> None:
    (tmp_path / "key_file.json").write_text(json.dumps(KEYS, indent=2))
    assert read_token(tmp_path / "key_file.json", role) == KEYS[role]["key"]


@pytest.mark.parametrize("text", ["oHo-yVm_", "oHo-yVm_\n", "12345678\n", "a.b/c+d=="], ids=["bare", "line", "digits", "base64"])
def test_a_plain_token_is_taken_as_it_stands(text: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    assert read_token(tmp_path / "token") == text.strip()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b"two words", b"two\nlines", "T\u00f6ken".encode(), b"\xff\xfe", b"a\x00b"),
        b'{\n"API": {"key": "x"}\n}',
        b'{\n"inference": {}\n}',
        b'{\n"inference": {"key": 1}\n}',
        b'{\n"inference": {"key": "a\\r\\nX-Other: b"}\n}',
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(CredentialsError, match=r"token holds no token: expected TorchServe's key_file\.json or") as raised:
        read_token(tmp_path / "token")
    assert "words" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="none: No such file or directory"):
        read_token(tmp_path / "none")


def test_header_carries_the_token() -> None:
    assert authorization("abc") == {"Authorization": "Bearer abc"}
    assert authorization(None) == {}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"inference": {"key": "a", "expiration time": "1970-01-02T00:00:00.123456789Z"}}', 86400.123456),
        ('{"inference": {"key": "a"}}', 0),
        ("a-plain-token", 0),
    ],
)
def test_expiration_is_torchserves(tmp_path: Path, content: str, expected: float) -> None:
    (tmp_path / "key_file.json").write_text(content)
    assert read_expiration(tmp_path / "key_file.json") == pytest.approx(expected)
    assert read_expiration(tmp_path / "none") == 0

"""Self-signed certificates for tests, made by openssl."""

import shutil
import subprocess
from pathlib import Path

import pytest

KEYS = {"rsa": "-newkey rsa:2048", "ec": "-newkey ec -pkeyopt ec_paramgen_curve:P-256"}


def make_certificate(folder: Path, names: str, key: str = "ec") -> tuple[Path, Path]:
    """Make a self-signed certificate and its key: PEM, not encrypted, mode 0600.

    Args:
        folder: for both files; it is made if it is missing.
        names: its subjects, in openssl's form: "IP:127.0.0.1,DNS:localhost".
        key: the kind of key, one of KEYS.
    """
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder.mkdir(exist_ok=True)
    certificate, private_key = folder / "certificate.pem", folder / "private-key.pem"
    command = f"openssl req -x509 {KEYS[key]} -nodes -days 2 -subj /CN=test -addext subjectAltName={names}"
    subprocess.run([*command.split(), "-keyout", private_key, "-out", certificate], check=True, capture_output=True)
    private_key.chmod(0o600)
    return certificate, private_key

"""Checks of a hardened server, before it serves and once it does.

Knows nothing of how the server is started: `server.py` does that. Every check names what is wrong and what would be right. What
these settings defend, and against whom, stands in .github/SECURITY.md.
"""

import hashlib
import os
import re
import socket
import ssl
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from scripts.packaging.archive_file import checksum_file_of
from scripts.paths import BUILD, HARDENED_CONFIGURATION, ROOT, SERVE_CONFIG

KEY_FILE = "key_file.json"  # TorchServe writes it into the folder that it is started in
FORMER_TOKENS = "former_tokens"
TOKENS_ON = "disable_token_authorization=false"  # a line of config.properties
FIRST_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
TLS_TIMEOUT_S = 10


class HardeningError(RuntimeError):
    """The server would not be as closed as it must be; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Hardening:
    """The settings that a hardened server needs beside those of every server.

    Attributes:
        certificate: the server's certificate, PEM; intermediate certificates may follow in the same file.
        private_key: the certificate's private key, RSA or elliptic curve, PEM, not encrypted.
        inference_host: the IPv4 address or name that requests are taken at; everything else stays on loopback.
        key_dir: a folder for the tokens, which belongs to the server alone.
        allow_privileged_user: serve even as root, or as a user who can change the code.
    """

    certificate: Path
    private_key: Path
    inference_host: str = "127.0.0.1"
    key_dir: Path = BUILD / "keys"
    allow_privileged_user: bool = False

    @property
    def key_file(self) -> Path:
        """The file of TorchServe's tokens, mode 0600."""
        return self.key_dir / KEY_FILE

    @property
    def former_tokens(self) -> Path:
        """The inference tokens of this start's replaced TorchServes, one a line: the front takes them too."""
        return self.key_dir / FORMER_TOKENS

    @property
    def local_host(self) -> str:
        """An address of the inference API on this machine."""
        return "127.0.0.1" if self.inference_host == "0.0.0.0" else self.inference_host  # noqa: S104  # compared, not bound


def verify_checksum(content: bytes, archive: Path, expected: str | None, *, required: bool) -> None:
    """Compare an archive's SHA-256 with the expected one: the one given, else the one in the file beside the archive.

    Args:
        content: the archive's bytes.
        archive: its path.
        expected: hexadecimal, in any letter case, or a file with it, as sha256sum writes them; None for the file beside the
            archive.
        required: whether there must be an expected one.
    Raises:
        HardeningError: they differ, or there is none though one is required.
    """
    source = "--archive-sha256"
    file = checksum_file_of(archive) if expected is None else Path(expected)
    if not SHA256.fullmatch(str(file)) and file.is_file():
        expected, source = file.read_text().partition(" ")[0].strip(), str(file)
    if expected is None:
        if required:
            raise HardeningError(f"there is no checksum of {archive}: give --archive-sha256, or build it with make package")
        return
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected.lower():
        raise HardeningError(f"{archive} is not what was built: expected SHA-256 {expected!r} ({source}), got {actual}")


def require_hardening(hardening: Hardening, configuration: Path) -> None:
    """Check a hardened server's user, its tokens and its certificate, before it starts.

    Args:
        hardening: the server's own settings.
        configuration: the config.properties that it will start from.
    Raises:
        HardeningError: the user can do more than serve, tokens are off, or TLS cannot be served with the certificate.
    """
    if not hardening.allow_privileged_user:
        require_least_privileges()
    if TOKENS_ON not in configuration.read_text().splitlines():
        raise HardeningError(f"expected {TOKENS_ON} in {configuration}, as in {HARDENED_CONFIGURATION.name}")
    require_usable_certificate(hardening.certificate, hardening.private_key)


def require_least_privileges() -> None:
    """Raise HardeningError where this process can do more than serve: as root, or with the right to change its own code."""
    advice = "start it as a user of its own, as serve_config/digits.service does, or pass --allow-privileged-user"
    if os.geteuid() == 0:
        raise HardeningError(f"a hardened server does not run as root; {advice}")
    code = [ROOT, ROOT / "scripts", SERVE_CONFIG, Path(sysconfig.get_path("purelib"))]
    writable = [str(folder) for folder in code if os.access(folder, os.W_OK)]
    if writable:
        raise HardeningError(f"a hardened server cannot change its own code, but this user can write {writable[0]}; {advice}")


def require_usable_certificate(certificate: Path, private_key: Path) -> None:
    """Raise HardeningError where TLS cannot be served with these: missing, not a pair, or a readable key."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, private_key, password=lambda: "")
        if private_key.stat().st_mode & 0o007:
            raise HardeningError(f"everyone on this machine can read {private_key}; set its mode to 600")
        _first_certificate(certificate)
    except FileNotFoundError as error:
        missing = next(file for file in (certificate, private_key) if not file.is_file())
        raise HardeningError(f"there is no file {missing}") from error
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise HardeningError(
            f"expected a certificate and its unencrypted key, got {certificate} and {private_key}: {error}"
        ) from error


def require_own_certificate(hardening: Hardening, port: int) -> None:
    """Raise HardeningError where the inference address does not present the hardened server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # it is compared instead, byte for byte
    try:
        with (
            socket.create_connection((hardening.local_host, port), TLS_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secured,
        ):
            served = secured.getpeercert(binary_form=True)
    except OSError as error:
        raise HardeningError(f"the inference address does not speak TLS: {error}") from error
    if served != _first_certificate(hardening.certificate):
        raise HardeningError(f"expected the inference address to present {hardening.certificate}, got another certificate")


def _first_certificate(file: Path) -> bytes:
    found = FIRST_CERTIFICATE.search(file.read_text())
    if found is None:
        raise ValueError("there is no certificate in it")
    return ssl.PEM_cert_to_DER_cert(found[0])


def prepare_key_dir(key_dir: Path) -> None:
    """Make the folder of the tokens, for this user alone, and remove the tokens of an earlier start.

    Raises:
        HardeningError: it belongs to someone else, or cannot be written.
    """
    advice = "choose another folder with --key-dir"
    try:
        key_dir.mkdir(parents=True, exist_ok=True)
        if key_dir.stat().st_uid != os.geteuid():
            raise HardeningError(f"{key_dir} belongs to another user; {advice}")
        key_dir.chmod(0o700)
        (key_dir / FORMER_TOKENS).unlink(missing_ok=True)
        key_file = key_dir / KEY_FILE
        key_file.unlink(missing_ok=True)
        key_file.touch(mode=0o600)  # TorchServe would go on without tokens that anyone knows
        key_file.unlink()
    except OSError as error:
        raise HardeningError(f"cannot write tokens into {key_dir} ({error.strerror}); {advice}") from error

"""What a hardened server has to hold before it serves, and when it does.

Knows nothing of how the server is started: `serve.py` does that. Every check names what is wrong and what would be right. What
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

from scripts.packaging.package import checksum_file_of
from scripts.paths import ROOT

KEY_FILE = "key_file.json"  # TorchServe writes it into the folder that it is started in
RSA_KEY = bytes.fromhex("2a864886f70d010101")  # rsaEncryption in DER: stands in certificates of RSA keys, and in no others
FIRST_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
TLS_TIMEOUT_S = 10


class HardeningError(RuntimeError):
    """The server would be open in a way that it must not be; the message says which, for a person."""


@dataclass(frozen=True, slots=True)
class Hardening:
    """What a hardened server needs beside the settings of any.

    Attributes:
        certificate: its own, PEM; followed by those that lead to a trusted one, where there are any.
        private_key: of the certificate, RSA, PEM, not encrypted.
        inference_host: where requests are taken; everything else stays on loopback.
        key_dir: a folder of the server's own, for the tokens.
        allow_privileged_user: serve even as root, or as a user who can change the code.
    """

    certificate: Path
    private_key: Path
    inference_host: str = "127.0.0.1"
    key_dir: Path = ROOT / "build" / "keys"
    allow_privileged_user: bool = False

    @property
    def key_file(self) -> Path:
        """TorchServe's tokens, mode 0600."""
        return self.key_dir / KEY_FILE

    @property
    def local_host(self) -> str:
        """An address of the inference API on this machine."""
        return "127.0.0.1" if self.inference_host == "0.0.0.0" else self.inference_host  # noqa: S104  # compared, not bound


def verify_checksum(content: bytes, archive: Path, expected: str | None, *, required: bool) -> None:
    """Hold an archive against its SHA-256: the one given, else the one in the file beside it.

    Raises:
        HardeningError: they differ, or there is none though one is required.
    """
    source = "the one given"
    beside = checksum_file_of(archive)
    if expected is None and beside.is_file():
        expected, source = beside.read_text().partition(" ")[0].strip(), str(beside)
    if expected is None:
        if required:
            raise HardeningError(f"there is no checksum of {archive}: give --archive-sha256, or build it with make package")
        return
    found = hashlib.sha256(content).hexdigest()
    if found != expected.lower():
        raise HardeningError(f"{archive} is not what was built: its SHA-256 is {found}, and {source} is {expected!r}")


def require_least_privileges() -> None:
    """Raise HardeningError where this process may do more than serve: as root, or with the right to change its own code."""
    advice = "start it as a user of its own (serve_config/digits.service does), or allow it with --allow-privileged-user"
    if os.geteuid() == 0:
        raise HardeningError(f"a hardened server does not run as root; {advice}")
    code = [ROOT, *(ROOT / name for name in ("scripts", "serve_config")), Path(sysconfig.get_path("purelib"))]
    writable = [str(folder) for folder in code if os.access(folder, os.W_OK)]
    if writable:
        raise HardeningError(f"a hardened server cannot change its own code, and this user may write {writable[0]}; {advice}")


def require_usable_certificate(certificate: Path, private_key: Path) -> None:
    """Raise HardeningError where TorchServe could not serve TLS with these: missing, not a pair, not RSA, a readable key."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, private_key, password=lambda: "")
        if private_key.stat().st_mode & 0o007:
            raise HardeningError(f"everyone on this machine can read {private_key}; chmod it to 600")
        if RSA_KEY not in _first_certificate(certificate):
            raise HardeningError(f"{certificate} is of no RSA key, and TorchServe's TLS knows no other")
    except FileNotFoundError as error:
        missing = next(file for file in (certificate, private_key) if not file.is_file())
        raise HardeningError(f"there is no file {missing}") from error
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise HardeningError(f"{certificate} and {private_key} are no certificate and its unencrypted key: {error}") from error


def require_own_certificate(hardening: Hardening, port: int) -> None:
    """Raise HardeningError where the inference address does not answer in TLS with the certificate that was given."""
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
        raise HardeningError(f"the inference address does not answer in TLS: {error}") from error
    if served != _first_certificate(hardening.certificate):
        raise HardeningError(f"the inference address does not answer with {hardening.certificate}")


def _first_certificate(file: Path) -> bytes:
    found = FIRST_CERTIFICATE.search(file.read_text())
    if found is None:
        raise ValueError("no certificate")
    return ssl.PEM_cert_to_DER_cert(found[0])


def prepare_key_dir(key_dir: Path) -> None:
    """Make the folder of the tokens, for this user alone, and remove what another start left in it.

    Raises:
        HardeningError: it belongs to someone else.
    """
    key_dir.mkdir(parents=True, exist_ok=True)
    if key_dir.stat().st_uid != os.geteuid():
        raise HardeningError(f"{key_dir} belongs to another user; choose another folder with --key-dir")
    key_dir.chmod(0o700)
    (key_dir / KEY_FILE).unlink(missing_ok=True)

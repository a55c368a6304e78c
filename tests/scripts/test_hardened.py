"""Checks of a hardened server before it serves. The running server is in tests/e2e/test_hardened.py."""

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.packaging.package import checksum_file_of
from scripts.paths import ROOT, SERVE_CONFIG
from scripts.serving import launcher
from scripts.serving.configuration import configure
from scripts.serving.hardened import (
    Hardening,
    HardeningError,
    prepare_key_dir,
    require_least_privileges,
    require_usable_certificate,
    verify_checksum,
)
from scripts.serving.launcher import Ports, ServeError, Settings, TorchServe
from tests.tls import make_certificate

ARCHIVE = b"an archive"
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


def properties_of(text: str) -> dict[str, str]:
    """The keys and values of a config.properties."""
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


# --- the archive


@pytest.mark.parametrize("given", [SHA256, SHA256.upper(), None], ids=["given", "in capitals", "beside the archive"])
def test_an_archive_with_its_checksum_is_accepted(given: str | None, tmp_path: Path) -> None:
    archive = tmp_path / "digits.mar"
    if given is None:
        checksum_file_of(archive).write_text(f"{SHA256}  digits.mar\n")
    verify_checksum(ARCHIVE, archive, given, required=True)


@pytest.mark.parametrize("required", [True, False], ids=["hardened", "development"])
@pytest.mark.parametrize("given", [SHA256, None], ids=["given", "beside the archive"])
def test_a_changed_archive_is_refused(given: str | None, required: bool, tmp_path: Path) -> None:
    archive = tmp_path / "digits.mar"
    checksum_file_of(archive).write_text(f"{SHA256}  digits.mar\n")
    with pytest.raises(
        HardeningError, match=rf"digits\.mar is not what was built: expected SHA-256 '{SHA256}' \(.*\), got [0-9a-f]{{64}}$"
    ):
        verify_checksum(ARCHIVE + b"!", archive, given, required=required)


def test_the_checksum_given_stands_above_the_file(tmp_path: Path) -> None:
    """Who can change the archive can change the file beside it."""
    archive = tmp_path / "digits.mar"
    checksum_file_of(archive).write_text(f"{hashlib.sha256(b'other').hexdigest()}  digits.mar\n")
    with pytest.raises(HardeningError, match=rf"expected SHA-256 '{SHA256}' \(--archive-sha256\)"):
        verify_checksum(b"other", archive, SHA256, required=True)


@pytest.mark.parametrize("written", [f"{SHA256}  digits.mar\n", SHA256.upper()], ids=["as sha256sum writes it", "alone"])
def test_the_checksum_given_may_stand_in_a_file(written: str, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text(written)
    verify_checksum(ARCHIVE, tmp_path / "digits.mar", str(sums), required=True)
    with pytest.raises(HardeningError, match=rf"expected SHA-256 '{SHA256}' \(.*sums\)" if "digits" in written else "sums"):
        verify_checksum(ARCHIVE + b"!", tmp_path / "digits.mar", str(sums), required=True)


def test_a_checksum_is_required_only_where_the_server_is_hardened(tmp_path: Path) -> None:
    verify_checksum(ARCHIVE, tmp_path / "digits.mar", None, required=False)
    with pytest.raises(HardeningError, match="there is no checksum of"):
        verify_checksum(ARCHIVE, tmp_path / "digits.mar", None, required=True)


# --- the certificate


def make_pair(folder: Path) -> tuple[Path, Path]:
    return make_certificate(folder, "DNS:localhost", "rsa")


def make_two(folder: Path) -> tuple[Path, Path]:
    return make_pair(folder / "a")[0], make_pair(folder / "b")[1]


def make_readable(folder: Path) -> tuple[Path, Path]:
    certificate, private_key = make_pair(folder)
    private_key.chmod(0o644)
    return certificate, private_key


def make_garbage(folder: Path) -> tuple[Path, Path]:
    certificate, private_key = make_pair(folder)
    private_key.write_text("no key")
    return certificate, private_key


@pytest.mark.parametrize("key", ["rsa", "ec"])
def test_a_certificate_and_its_key_are_accepted(key: str, tmp_path: Path) -> None:
    require_usable_certificate(*make_certificate(tmp_path, "DNS:localhost", key))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(make_two, "expected a certificate and its unencrypted key, got", id="another's key"),
        pytest.param(make_garbage, "expected a certificate and its unencrypted key, got", id="no key"),
        pytest.param(make_readable, r"everyone on this machine can read .*private-key\.pem", id="readable key"),
        pytest.param(lambda folder: (folder / "a", folder / "b"), "there is no file .*/a$", id="missing"),
    ],
)
def test_a_certificate_that_cannot_serve_is_refused(
    make: Callable[[Path], tuple[Path, Path]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(HardeningError, match=message):
        require_usable_certificate(*make(tmp_path))


# --- privileges


def test_root_and_the_owner_of_the_code_are_refused() -> None:
    """These tests run as one of the two; that another user is accepted is tested end to end."""
    if os.geteuid() != 0:
        assert os.access(ROOT, os.W_OK)
    message = "does not run as root" if os.geteuid() == 0 else "this user can write"
    with pytest.raises(HardeningError, match=message):
        require_least_privileges()


def test_folder_of_the_tokens_is_emptied_and_private(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    (tmp_path / "keys" / "key_file.json").write_text("old")
    prepare_key_dir(tmp_path / "keys")
    assert list((tmp_path / "keys").iterdir()) == []
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


# --- the configuration


def test_hardened_configuration_differs_from_the_development_one_only_in_what_it_locks() -> None:
    development = properties_of((SERVE_CONFIG / "config.properties").read_text())
    hardened = properties_of((SERVE_CONFIG / "config-hardened.properties").read_text())
    changed = {
        key: (development.get(key), hardened.get(key))
        for key in development | hardened
        if development.get(key) != hardened.get(key)
    }
    assert hardened["vmargs"].startswith(development["vmargs"])
    del changed["vmargs"]
    assert changed == {
        "disable_token_authorization": ("true", "false"),
        "token_expiration_min": (None, "43200"),
        "allowed_urls": ("file://.*", "(?!)"),
        "use_env_allowed_urls": (None, "false"),
    }
    assert hardened["enable_model_api"] == hardened["install_py_dep_per_model"] == hardened["enable_envvars_config"] == "false"


def test_torchserve_itself_stays_on_this_machine(tmp_path: Path) -> None:
    hardening = Hardening(tmp_path / "certificate.pem", tmp_path / "private-key.pem", inference_host="0.0.0.0")
    settings = Settings(
        ports=Ports(1, 2, 3, 4, 5), configuration=SERVE_CONFIG / "config-hardened.properties", hardening=hardening
    )
    properties = properties_of(configure(settings, tmp_path))
    addresses = {key: value for key, value in properties.items() if key.endswith(("_address", "_port"))}
    assert addresses == {
        "inference_address": f"unix:{tmp_path}/torchserve.sock",
        "management_address": "http://127.0.0.1:2",
        "metrics_address": "http://127.0.0.1:3",
        "grpc_inference_address": "127.0.0.1",
        "grpc_management_address": "127.0.0.1",
        "grpc_inference_port": "4",
        "grpc_management_port": "5",
    }


# --- the command line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--hardened"], "--hardened needs --certificate and --private-key"),
        (["--hardened", "--certificate", "a"], "--hardened needs --certificate and --private-key"),
        (["--certificate", "a"], "--certificate needs --hardened"),
        (["--inference-host", "0.0.0.0"], "--inference-host needs --hardened"),
        (
            ["--hardened", "--certificate", "a", "--private-key", "b", "--inference-host", "::1"],
            "expected an IPv4 address or a name without a port as --inference-host, got '::1'",
        ),
    ],
)
def test_half_a_hardened_command_is_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServeError, match=message):
        launcher.read_settings(launcher.build_parser().parse_args(command))
    assert launcher.main(command) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_development_takes_its_own_configuration() -> None:
    settings = launcher.read_settings(launcher.build_parser().parse_args([]))
    assert settings.hardening is None
    assert settings.configuration.name == "config.properties"


def start_hardened(archive: Path, tmp_path: Path, **changed: Any) -> None:
    """Start a server that must not start."""
    certificate, private_key = make_pair(tmp_path / "tls")
    hardening = Hardening(certificate, private_key, key_dir=tmp_path / "keys", allow_privileged_user=True)
    settings = Settings(
        archive=archive,
        archive_sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        log_dir=tmp_path / "logs",
        ports=Ports.free(),
        configuration=SERVE_CONFIG / "config-hardened.properties",
        hardening=hardening,
    )
    with TorchServe(replace(settings, **changed)):
        pytest.fail("it started")


def test_a_configuration_without_tokens_is_not_served_to_others(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"expected disable_token_authorization=false in .*/config\.properties"):
        start_hardened(archive, tmp_path, configuration=SERVE_CONFIG / "config.properties")


def test_a_second_start_leaves_the_tokens_of_the_first(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "key_file.json").write_text("the first server's")
    ports = Ports.free()
    with socket.create_server(("127.0.0.1", ports.inference)), pytest.raises(ServeError, match="is taken"):
        start_hardened(archive, tmp_path, ports=ports)
    assert (tmp_path / "keys" / "key_file.json").read_text() == "the first server's"


def test_a_changed_archive_is_not_served(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digits.mar").write_bytes(archive.read_bytes() + b"\0")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    certificate, private_key = make_pair(tmp_path / "tls")
    for more in (
        [],
        ["--hardened", "--certificate", str(certificate), "--private-key", str(private_key), "--key-dir", str(tmp_path / "keys")],
    ):
        command = [
            "--archive",
            str(tmp_path / "digits.mar"),
            "--archive-sha256",
            sha256,
            "--log-dir",
            str(tmp_path / "logs"),
            *more,
        ]
        assert launcher.main(command) == 1
        assert "digits.mar is not what was built: expected SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "keys").exists()

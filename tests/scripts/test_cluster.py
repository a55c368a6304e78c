"""Cluster mode before it serves. The running server is in tests/e2e/test_cluster.py."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.paths import HARDENED_CONFIGURATION
from scripts.serving import launcher, ready
from scripts.serving.cluster import Cluster, ConsoleFollower, mark_draining
from scripts.serving.configuration import configure
from scripts.serving.hardened import Hardening
from scripts.serving.launcher import Ports, ServeError, Settings


def properties_of(text: str) -> dict[str, str]:
    """The keys and values of a config.properties."""
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def settings_of(*options: str) -> Settings:
    return launcher.read_settings(launcher.build_parser().parse_args(options))


def test_of_torchserve_itself_only_metrics_are_reachable(tmp_path: Path) -> None:
    properties = properties_of(configure(settings_of("--cluster"), tmp_path))
    assert properties["inference_address"] == f"unix:{tmp_path}/torchserve.sock"
    assert properties["metrics_address"] == "http://0.0.0.0:8082"
    assert properties["management_address"] == "http://127.0.0.1:8081"
    assert properties["grpc_inference_address"] == properties["grpc_management_address"] == "127.0.0.1"


def test_without_tokens_all_else_is_as_closed_as_hardened(tmp_path: Path) -> None:
    hardened = properties_of(HARDENED_CONFIGURATION.read_text())
    served = properties_of(configure(settings_of("--cluster"), tmp_path))
    changed = {
        "inference_address",
        "metrics_address",
        "disable_token_authorization",
        "vmargs",
        "metrics_config",
        "system_metrics_cmd",
    }
    assert {key for key in served if served[key] != hardened.get(key)} <= changed
    assert hardened.keys() <= served.keys()
    assert served["disable_token_authorization"] == "true"
    assert served["enable_model_api"] == "false"
    assert served["allowed_urls"] == "(?!)"
    assert hardened["vmargs"] in served["vmargs"]


def test_tokens_come_with_hardening(tmp_path: Path) -> None:
    settings = settings_of("--cluster", "--hardened", "--certificate=c.pem", "--private-key=k.pem")
    properties = properties_of(configure(settings, tmp_path))
    assert properties["metrics_address"] == "http://0.0.0.0:8082"
    assert properties["disable_token_authorization"] == "false"


def test_a_given_host_of_a_hardened_server_stays() -> None:
    hardening = Hardening(Path("c.pem"), Path("k.pem"), inference_host="10.0.0.7")
    settings = replace(Settings(), hardening=hardening, cluster=Cluster())
    assert (settings.inference_host, settings.metrics_host) == ("10.0.0.7", "0.0.0.0")
    assert (Settings().inference_host, Settings().metrics_host) == ("127.0.0.1", "127.0.0.1")


def test_drain_delay_is_the_clusters() -> None:
    settings = settings_of("--cluster", "--drain-delay=2.5")
    assert settings.cluster is not None
    assert settings.cluster.drain_delay_s == 2.5
    with pytest.raises(ServeError, match=r"^--drain-delay needs --cluster$"):
        settings_of("--drain-delay=2.5")


def test_a_port_that_another_address_holds_is_named() -> None:
    ports = Ports.free()
    with socket.socket() as taken:
        taken.bind(("127.0.0.2", ports.metrics))
        taken.listen()
        ports.require_free()  # loopback's own is free
        with pytest.raises(ServeError, match=r"choose another with --metrics-port \(0\.0\.0\.0"):
            ports.require_free(metrics_host="0.0.0.0")


def test_draining_server_is_not_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark_draining(tmp_path, draining=True)
    assert ready.main([f"--log-dir={tmp_path}", "--address=http://127.0.0.1:9"]) == 1
    assert "not ready: the server drains" in capsys.readouterr().err
    mark_draining(tmp_path, draining=False)
    mark_draining(tmp_path, draining=False)
    assert ready.main([f"--log-dir={tmp_path}", "--address=http://127.0.0.1:9", f"--weights-sha256={'0' * 64}"]) == 1
    assert "not ready: no server answers" in capsys.readouterr().err


def test_console_is_shown_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = tmp_path / "console.log"
    with ConsoleFollower(console):
        console.write_text("first line\n")
        with console.open("a") as opened:
            opened.write("the last one")
    assert capsys.readouterr().err == "first line\nthe last one"

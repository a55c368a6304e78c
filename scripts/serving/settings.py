"""The settings of a server: archive, ports, device, logs, hardening. Knows nothing of TorchServe's processes."""

import contextlib
import errno
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from scripts.paths import ARCHIVE, BUILD, CONFIGURATION, LOG_CONFIGURATION
from scripts.serving.cluster import EVERY_ADDRESS, Cluster
from scripts.serving.hardened import Hardening
from scripts.serving.watch import Limits

LOOPBACK = "127.0.0.1"
CONSOLE_FILE = "console.log"  # in the folder of the logs: all that TorchServe prints
MAX_PORT = 65_535


class ServeError(RuntimeError):
    """The server cannot be started; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports: inference and metrics on loopback, or where the settings say; the others on loopback."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071

    @classmethod
    def free(cls) -> Self:
        """Find ports that nothing listens on now."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in cls.__dataclass_fields__]
            for opened in sockets:
                opened.bind((LOOPBACK, 0))
            return cls(*(opened.getsockname()[1] for opened in sockets))

    def require_free(self, inference_host: str = LOOPBACK, metrics_host: str = LOOPBACK) -> None:
        """Raise ServeError, which names the port and its option, where one of them cannot be listened on."""
        reachable = {"inference": inference_host, "metrics": metrics_host}
        options: dict[int, str] = {}
        for name in self.__dataclass_fields__:
            host, port, option = reachable.get(name, LOOPBACK), getattr(self, name), option_of(name)
            if not 0 < port <= MAX_PORT:
                raise ServeError(f"expected a port from 1 to {MAX_PORT} as {option}, got {port}")
            if port in options:
                raise ServeError(f"port {port} is given twice; choose another with {option} or {options[port]}")
            options[port] = option
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                    probe.listen()  # two sockets can be bound to one port, and only one can listen
                except OSError as error:
                    raise ServeError(_describe_bind_error(error, host, port, option)) from error


def option_of(name: str) -> str:
    """Name the command line's option of a port."""
    return f"--{name.replace('_', '-')}-port"


def _describe_bind_error(error: OSError, host: str, port: int, option: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken; choose another with {option} ({host}: {error.strerror})"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not listen on port {port}; choose one above 1023 with {option}"
    return f"cannot listen on {host}, port {port} ({error.strerror}); choose an address of this machine with --inference-host"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one server.

    Attributes:
        archive: the .mar file; its stem is the model's name.
        ports: of the APIs.
        device: "cpu", "gpu", or "auto" for a GPU where PyTorch sees one.
        log_dir: a folder for the logs, which belongs to this server alone while it runs; they are appended to.
        model_config: values for keys of model-config.yaml, instead of the file's own.
        configuration: TorchServe's config.properties.
        log_configuration: its log4j2.xml.
        archive_sha256: the archive's expected SHA-256, in hexadecimal; None for the one in the file beside it, if there is one.
        hardening: the settings of a server that others can reach; None in development.
        cluster: the settings of a server in a cluster; None for one that stands alone.
        requests_per_second: from one address, where a proxy takes the requests; 0 for any number, None for the mode's default.
        trusted_proxies: networks of the load balancers in front, whose X-Forwarded-For names the client.
        limits: beyond which the server is replaced.
    """

    archive: Path = ARCHIVE
    ports: Ports = Ports()
    device: str = "auto"
    log_dir: Path = BUILD / "logs" / "8080"
    model_config: Mapping[str, Any] = field(default_factory=dict)
    configuration: Path = CONFIGURATION
    log_configuration: Path = LOG_CONFIGURATION
    archive_sha256: str | None = None
    hardening: Hardening | None = None
    cluster: Cluster | None = None
    requests_per_second: int | None = None
    trusted_proxies: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def inference_host(self) -> str:
        """The IPv4 address or name that requests are taken at."""
        if self.hardening is not None:
            return self.hardening.inference_host
        return EVERY_ADDRESS if self.cluster is not None else LOOPBACK

    @property
    def is_fronted(self) -> bool:
        """Whether a proxy takes the requests, and TorchServe a Unix socket that only the proxy reaches."""
        return self.hardening is not None or self.cluster is not None

    @property
    def metrics_host(self) -> str:
        """The IPv4 address or name that metrics are served at."""
        return EVERY_ADDRESS if self.cluster is not None else LOOPBACK

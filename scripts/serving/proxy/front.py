"""The front of one TorchServe on this machine: Envoy where others reach it, TorchServe's Unix socket behind it."""

import os
import socket
from pathlib import Path

from scripts.serving.configuration import INFERENCE_SOCKET
from scripts.serving.proxy.configuration import Address, Front
from scripts.serving.proxy.process import Envoy
from scripts.serving.settings import LOOPBACK, Settings

ACCESS_LOG = "front_access.log"
LOG = "front.log"
MAX_THREADS = 4  # of Envoy; one passes on some thousands of requests a second


def make_front(settings: Settings, folder: Path) -> Envoy:
    """Make the front of a server, not started yet.

    Args:
        settings: the server's.
        folder: the server's temporary folder.
    """
    hardening = settings.hardening
    front = Front(
        listen=Address(socket.gethostbyname(settings.inference_host), settings.ports.inference),
        model_name=settings.archive.stem,
        upstreams=[Address(str(folder / INFERENCE_SOCKET))],
        grpc_upstreams=[Address(LOOPBACK, settings.ports.grpc_inference)],
        certificate=None if hardening is None else hardening.certificate.resolve(),
        private_key=None if hardening is None else hardening.private_key.resolve(),
        key_file=None if hardening is None else hardening.key_file.resolve(),
        access_log=settings.log_dir.resolve() / ACCESS_LOG,
        admin_socket=folder / "front.sock",
    )
    return Envoy(front, folder, settings.log_dir / LOG, concurrency=min(MAX_THREADS, os.cpu_count() or 1))

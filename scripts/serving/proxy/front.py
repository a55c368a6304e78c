"""The front of one TorchServe on this machine: Envoy where others reach it, TorchServe's Unix socket behind it."""

import os
import socket
from pathlib import Path

from scripts.serving.configuration import INFERENCE_SOCKET
from scripts.serving.proxy.configuration import REQUESTS_PER_SECOND, Address, Front
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
    hardening, requests_per_second = settings.hardening, settings.requests_per_second
    if requests_per_second is None:
        # A server in a cluster sees its load balancer's address alone, unless that says whose request it passes on.
        sees_clients = settings.cluster is None or settings.trusted_proxies
        requests_per_second = REQUESTS_PER_SECOND if sees_clients else 0
    front = Front(
        listen=Address(socket.gethostbyname(settings.inference_host), settings.ports.inference),
        model_name=settings.archive.stem,
        upstreams=[Address(str(folder / INFERENCE_SOCKET))],
        grpc_upstreams=[Address(LOOPBACK, settings.ports.grpc_inference)],
        certificate=None if hardening is None else hardening.certificate.resolve(),
        private_key=None if hardening is None else hardening.private_key.resolve(),
        key_file=None if hardening is None else hardening.key_file.resolve(),
        requests_per_second=requests_per_second,
        trusted_proxies=settings.trusted_proxies,
        access_log=settings.log_dir.resolve() / ACCESS_LOG,
        admin_socket=folder / "front.sock",
    )
    return Envoy(front, folder, settings.log_dir / LOG, concurrency=min(MAX_THREADS, os.cpu_count() or 1))

"""An archive and settings -> the configuration of Envoy, a maintained proxy, as the front that others reach.

Envoy takes each request apart and writes it anew: TorchServe's frontend (Netty of 2020) never sees the bytes of a client's
connection, only well-formed requests of the API's routes with whole bodies. What Envoy cannot do by itself stands in two Lua
files beside this one: tokens and forms, and "Worker died." among the 500s. Knows nothing of processes: `process.py` runs Envoy.
Written for Envoy 1.40, see https://www.envoyproxy.io/docs/envoy/v1.40.0/.
"""

import ipaddress
import json
import re
import socket
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import yaml

from handler.limits import MAX_BODY_BYTES
from scripts.serving.ready import ReferenceAnswer

HERE = Path(__file__).parent
MAX_FORM_FIELDS = 64  # of one form; the API has fewer options
MAX_HEADERS = 64  # of one request
MAX_HEADER_KIB = 16  # of all headers of one request, with its path
MAX_CONNECTIONS = 1000  # of all clients
MAX_STREAMS = 100  # requests at a time on one connection of HTTP/2
MAX_REQUESTS = 2000  # passed on at a time: more than TorchServe's queue holds, so that TorchServe itself says that it is full
MAX_HEAP_BYTES = 1024**3  # of Envoy; beyond nine tenths of it the largest requests in flight are given up, then all new ones
HEADER_TIMEOUT_S = 10  # for a TLS handshake, and for the headers of a request
REQUEST_TIMEOUT_S = 60  # for a whole request: 32 MiB at 5 Mbit/s
IDLE_TIMEOUT_S = 60  # of a connection without a request, and of a request or reply that does not move
MIN_IDLE_TIMEOUT_S = 2  # of the former, scaled down as more than half of all places are taken; 8 s were measured at nine tenths
REPLY_TIMEOUT_S = 70  # more than responseTimeout (serve_config/model-config.yaml), so that TorchServe's own answer is given
WHOLE_REPLY_BYTES = 1024 * 1024  # of several servers' replies smaller ones are passed on when whole; larger drawings take memory
SILENCE_S = 10  # after which another server is asked too; the slowest request by itself takes three
CONNECT_TIMEOUT_S = 1
# From one address, and twice as many at once after a pause: about half of what two cores do, so that no address takes them all.
REQUESTS_PER_SECOND = 500
MAX_ADDRESSES = 10_000  # whose shares are remembered, the latest
IPV6_PREFIX = 64  # bits that count as one address: one customer's network
RETRY_AFTER_S = 1  # when a share has grown again
# Forward secrecy and authenticated encryption alone: no CBC, no RSA key exchange. TLS 1.3 has its own three, all of them such.
CIPHERS = [
    "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
    "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
]
GRPC_SERVICES = (
    "/org.pytorch.serve.grpc.inference.InferenceAPIsService/",
    "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/",
)
# Errors of the proxy itself: type and message by status.
ERRORS = {
    400: ("InvalidRequest", "expected a well-formed HTTP request, got one that can be read in more than one way"),
    403: ("NotPermitted", "expected a request without an upgrade of its protocol"),
    404: ("NotFound", "expected one of the API's routes, got another path"),
    405: ("MethodNotAllowed", "expected POST or PUT on this route, or GET on /ping"),
    408: ("RequestTimeout", f"expected a whole request within {REQUEST_TIMEOUT_S} s"),
    413: ("RequestTooLarge", f"expected at most {MAX_BODY_BYTES} bytes in a body, got more"),
    417: ("ExpectationFailed", "expected no Expect header but '100-continue'"),
    426: ("UpgradeRequired", "expected version 1.1 or 2 of HTTP"),
    429: ("TooManyRequests", "expected fewer requests a second from this address; try again"),
    431: ("HeadersTooLarge", f"expected at most {MAX_HEADERS} headers with {MAX_HEADER_KIB} KiB in all, got more"),
    501: ("NotImplemented", "expected no Transfer-Encoding but 'chunked'"),
    502: ("BadGateway", "the server gave a reply that cannot be read; try again"),
    503: ("Overloaded", "no server takes requests now; try again"),
    504: ("GatewayTimeout", f"the server gave no reply within {REPLY_TIMEOUT_S} s"),
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a host and a TCP port, or the path of a Unix socket.

    Attributes:
        host: an IPv4 address or a name; the path of a Unix socket.
        port: None for a Unix socket.
    """

    host: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "HOST:PORT" or "unix:PATH".

        Raises:
            ValueError: it is neither.
        """
        if text.startswith("unix:/"):
            return cls(text.removeprefix("unix:"))
        host, colon, port = text.rpartition(":")
        if not (host and colon and ":" not in host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"expected HOST:PORT or unix:PATH, got {text!r}")
        return cls(host, int(port))

    def write(self) -> dict[str, Any]:
        """Write it in Envoy's form."""
        if self.port is None:
            return {"pipe": {"path": self.host}}
        return {"socket_address": {"address": self.host, "port_value": self.port}}


@dataclass(frozen=True, slots=True)
class Front:
    """The settings of a proxy.

    Attributes:
        listen: where requests are taken.
        model_name: of the served archive; it stands in the routes.
        upstreams: the servers' inference addresses.
        grpc_upstreams: their gRPC addresses; without any, no gRPC passes.
        certificate: PEM, for TLS; None for plain HTTP.
        private_key: the certificate's, PEM.
        key_file: the clients' token, in TorchServe's key_file.json or alone; None where no token is asked.
        upstream_ca: certificates by which the servers are known, PEM; None for plain HTTP to them.
        reference: each server's health is asked by this image, and told by its digit and weights; None for no such check.
        requests_per_second: from one address; 0 for any number.
        trusted_proxies: networks of load balancers and proxies in front of this one. The address of a request that comes from one
            of them is the last one in its X-Forwarded-For outside of these networks; of any other, the one it comes from.
        access_log: a file for what was refused or failed; None for none.
        admin_socket: the path of a Unix socket for Envoy's own questions; None for none.
    """

    listen: Address
    model_name: str
    upstreams: Sequence[Address]
    grpc_upstreams: Sequence[Address] = ()
    certificate: Path | None = None
    private_key: Path | None = None
    key_file: Path | None = None
    upstream_ca: Path | None = None
    reference: ReferenceAnswer | None = None
    requests_per_second: int = REQUESTS_PER_SECOND
    trusted_proxies: Sequence[str] = ()
    access_log: Path | None = None
    admin_socket: Path | None = None


def write_configuration(front: Front) -> str:
    """Write Envoy's bootstrap configuration, YAML."""
    bootstrap: dict[str, Any] = {
        "static_resources": {"listeners": [_listener(front)], "clusters": _clusters(front)},
        "overload_manager": _overload_manager(),
    }
    if front.admin_socket is not None:
        bootstrap["admin"] = {"address": {"pipe": {"path": str(front.admin_socket), "mode": 0o600}}}
    return yaml.dump(bootstrap, Dumper=_Dumper, sort_keys=False, width=130)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are, and nothing as a reference to something above."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _typed(name: str, message: str, **fields: object) -> dict[str, Any]:
    """One of Envoy's extensions: its name, the type of its settings, and these."""
    return {"name": name, "typed_config": {"@type": f"type.googleapis.com/{message}", **fields}}


def _seconds(seconds: float) -> str:
    return f"{seconds:g}s"


# --- what clients reach


def _listener(front: Front) -> dict[str, Any]:
    timeout = _seconds(HEADER_TIMEOUT_S)
    chain: dict[str, Any] = {"filters": [_connection_manager(front)], "transport_socket_connect_timeout": timeout}
    listener: dict[str, Any] = {
        "name": "front",
        "address": front.listen.write(),
        "enable_reuse_port": False,  # else a second Envoy could listen on the same port, and take half of the requests
        "per_connection_buffer_limit_bytes": 64 * 1024,  # of what waits in a connection; a body is kept by its request
        "filter_chains": [chain],
    }
    if front.certificate is not None:
        certificate = {
            "certificate_chain": {"filename": str(front.certificate)},
            "private_key": {"filename": str(front.private_key)},
        }
        parameters = {
            "tls_minimum_protocol_version": "TLSv1_2",
            "tls_maximum_protocol_version": "TLSv1_3",
            "cipher_suites": CIPHERS,
        }
        chain["transport_socket"] = _typed(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            common_tls_context={
                "tls_params": parameters,
                "tls_certificates": [certificate],
                "alpn_protocols": ["h2", "http/1.1"],
            },
        )
        chain["filter_chain_match"] = {"transport_protocol": "tls"}
        in_plain = {"filter_chain_match": {"transport_protocol": "raw_buffer"}, "filters": [_refuser_of_plain_http()]}
        listener["filter_chains"].append(in_plain)
        listener["listener_filters"] = [
            _typed(
                "envoy.filters.listener.tls_inspector",
                "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
            )
        ]
        listener["listener_filters_timeout"] = timeout
    return listener


def _refuser_of_plain_http() -> dict[str, Any]:
    """Tell a client of plain HTTP what is wrong, without reading more than the head of its request."""
    message = '{"error": {"code": 403, "type": "NotPermitted", "message": "this port only accepts HTTPS"}}'
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 403, "body": {"inline_string": message}}}
    return _typed(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="plain",
        codec_type="HTTP1",
        request_headers_timeout=_seconds(HEADER_TIMEOUT_S),
        common_http_protocol_options={"idle_timeout": _seconds(HEADER_TIMEOUT_S)},
        max_request_headers_kb=MAX_HEADER_KIB,
        http_filters=[_typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router")],
        route_config={"virtual_hosts": [{"name": "plain", "domains": ["*"], "routes": [route]}]},
    )


def _connection_manager(front: Front) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stat_prefix": "front",
        "http_filters": _filters(front),
        "route_config": {
            "name": "api",
            "virtual_hosts": [
                {
                    "name": "api",
                    "domains": ["*"],
                    "request_body_buffer_limit": MAX_BODY_BYTES,
                    "routes": _routes(front),
                    # Of no use to TorchServe.
                    "request_headers_to_remove": ["te", "x-forwarded-for", "x-forwarded-proto", "x-envoy-external-address"],
                    "response_headers_to_remove": ["x-worker-died"],
                }
            ],
        },
        "local_reply_config": _local_replies(),
        # What can be read in two ways is refused.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "strip_trailing_host_dot": True,
        "http_protocol_options": {"allow_absolute_url": False, "allow_chunked_length": False, "accept_http_10": False},
        "common_http_protocol_options": {
            "headers_with_underscores_action": "REJECT_REQUEST",
            "max_headers_count": MAX_HEADERS,
            "idle_timeout": _seconds(IDLE_TIMEOUT_S),
        },
        "http2_protocol_options": {
            "max_concurrent_streams": MAX_STREAMS,
            "initial_stream_window_size": 256 * 1024,
            "initial_connection_window_size": 1024 * 1024,
        },
        "max_request_headers_kb": MAX_HEADER_KIB,
        # Slow clients.
        "request_headers_timeout": _seconds(HEADER_TIMEOUT_S),
        "request_timeout": _seconds(REQUEST_TIMEOUT_S),
        "stream_idle_timeout": _seconds(REPLY_TIMEOUT_S + IDLE_TIMEOUT_S),
        # No client is believed what it says of itself, or of the way that its request took. Its own request id is passed on.
        **_client_address(front.trusted_proxies),
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]},
        "early_header_mutation_extensions": [
            _typed(
                "envoy.http.early_header_mutation.header_mutation",
                "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                mutations=[{"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}}],
            )
        ],
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "server_header_transformation": "OVERWRITE",
        "server_name": "front",
    }
    if front.access_log is not None:
        fields["access_log"] = [_access_log(front.access_log)]
    return _typed(
        "envoy.filters.network.http_connection_manager",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        **fields,
    )


def _client_address(trusted_proxies: Sequence[str]) -> dict[str, Any]:
    """Find the address of a client: the connection's, or the one that a trusted proxy reports."""
    if not trusted_proxies:
        return {"use_remote_address": True}
    networks = [ipaddress.ip_network(network) for network in trusted_proxies]
    cidrs = [{"address_prefix": str(network.network_address), "prefix_len": network.prefixlen} for network in networks]
    xff = _typed(
        "envoy.http.original_ip_detection.xff",
        "envoy.extensions.http.original_ip_detection.xff.v3.XffConfig",
        xff_trusted_cidrs={"cidrs": cidrs},
    )
    return {"use_remote_address": False, "original_ip_detection_extensions": [xff]}


def _access_log(file: Path) -> dict[str, Any]:
    """Log what was refused or failed: who, when, which kind of route, and Envoy's own words. Nothing that a client chose."""
    line = "%START_TIME% %DOWNSTREAM_REMOTE_ADDRESS% %ROUTE_NAME% %RESPONSE_CODE% %RESPONSE_FLAGS% %DURATION%\n"
    return _typed(
        "envoy.access_loggers.file",
        "envoy.extensions.access_loggers.file.v3.FileAccessLog",
        path=str(file),
        log_format={"text_format_source": {"inline_string": line}},
    ) | {
        "filter": {
            "status_code_filter": {"comparison": {"op": "GE", "value": {"default_value": 400, "runtime_key": "logged_status"}}}
        }
    }


def _filters(front: Front) -> list[dict[str, Any]]:
    """What each request passes, in this order."""
    constants = {
        "KEY_FILE": None if front.key_file is None else str(front.key_file),
        "MAX_BODY_BYTES": MAX_BODY_BYTES,
        "MAX_FORM_FIELDS": MAX_FORM_FIELDS,
    }
    return [
        *([_share_of_an_address(front.requests_per_second)] if front.requests_per_second else []),
        _lua("requests.lua", constants),
        # Whole bodies alone are passed on, with their length: a slow client holds nothing of TorchServe.
        _typed("envoy.filters.http.buffer", "envoy.extensions.filters.http.buffer.v3.Buffer", max_request_bytes=MAX_BODY_BYTES),
        _typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", suppress_envoy_headers=True),
    ]


def _share_of_an_address(requests_per_second: int) -> dict[str, Any]:
    """Limit the requests of each client's address, whether they have a token or not."""
    everything = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    any_number = {"max_tokens": 2**31, "tokens_per_fill": 2**31, "fill_interval": "1s"}  # of all addresses together
    share = {"max_tokens": 2 * requests_per_second, "tokens_per_fill": requests_per_second, "fill_interval": "1s"}
    return _typed(
        "envoy.filters.http.local_ratelimit",
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        stat_prefix="rate",
        token_bucket=any_number,
        filter_enabled=everything | {"runtime_key": "rate_enabled"},
        filter_enforced=everything | {"runtime_key": "rate_enforced"},
        rate_limits=[{"actions": [{"masked_remote_address": {"v4_prefix_mask_len": 32, "v6_prefix_mask_len": IPV6_PREFIX}}]}],
        # An entry without a value: each address has a bucket of its own.
        descriptors=[{"entries": [{"key": "masked_remote_address"}], "token_bucket": share}],
        max_dynamic_descriptors=MAX_ADDRESSES,
        rate_limited_as_resource_exhausted=True,  # to a client of gRPC
    )


def _lua(file: str, constants: Mapping[str, str | int | None]) -> dict[str, Any]:
    """A file of Lua with constants in front of it."""
    written = "".join(f"local {name} = {_write_lua(value)}\n" for name, value in constants.items())
    return _typed(
        "envoy.filters.http.lua",
        "envoy.extensions.filters.http.lua.v3.Lua",
        default_source_code={"inline_string": written + (HERE / file).read_text()},
    )


def _write_lua(value: str | int | None) -> str:
    """Write a constant of Lua; of a text every unusual byte by its number, so that none has a meaning."""
    if isinstance(value, str):
        usual = (string.ascii_letters + string.digits + "/._-").encode()
        return '"' + "".join(chr(byte) if byte in usual else f"\\{byte:03d}" for byte in value.encode()) + '"'
    return "nil" if value is None else str(value)


# --- routes


def _routes(front: Front) -> list[dict[str, Any]]:
    """The API's routes, and a refusal for everything else. After the model's name TorchServe takes its version."""
    model = quote(front.model_name)
    routes = [_refusal({"prefix": "/", "headers": [{"name": "expect", "present_match": True}]}, 417)]
    if front.grpc_upstreams:
        routes += [
            {"name": "grpc", "match": {"prefix": service, "grpc": {}}, "route": _route(front, "grpc")}
            for service in GRPC_SERVICES
        ]
    kinds: list[tuple[str, dict[str, Any]]] = [
        *[(name, {"safe_regex": {"regex": f"/{name}/{re.escape(model)}(/[^/]+)?"}}) for name in ("predictions", "explanations")],
        *[("v1", {"path": f"/v1/models/{model}:{verb}"}) for verb in ("predict", "explain")],
        *[("v2", {"path": f"/v2/models/{model}/{verb}"}) for verb in ("infer", "explain")],
    ]
    for name, path in kinds:
        routes.append({"name": name, "match": path | {"headers": [_methods("POST", "PUT")]}, "route": _route(front)})
        routes.append(_refusal(path, 405, {"allow": "POST, PUT"}))
    routes.append({"name": "ping", "match": {"path": "/ping", "headers": [_methods("GET", "PUT")]}, "route": _route(front)})
    return [*routes, _refusal({"path": "/ping"}, 405, {"allow": "GET"}), _refusal({"prefix": "/"}, 404)]


def _methods(*names: str) -> dict[str, Any]:
    return {"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(names)}}}


def _refusal(match: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> dict[str, Any]:
    added = [{"header": {"key": key, "value": value}} for key, value in (headers or {}).items()]
    return {"name": "refused", "match": match, "direct_response": {"status": status}, "response_headers_to_add": added}


def _route(front: Front, cluster: str = "torchserve") -> dict[str, Any]:
    """Pass a request on, and again where its server could not be reached or lost it. An answer changes nothing on the server.

    Of TorchServe's own errors only those are retried that say nothing about the request: 507, and 500 "Worker died.", which
    replies.lua marks; in gRPC the same words. Several servers: on another one, and also where the first one was killed in the
    middle of a request, is full, or has lost its TorchServe (503; in gRPC UNAVAILABLE).
    """
    several = len(front.upstreams) > 1
    conditions = ["connect-failure", "refused-stream", "retriable-status-codes", "retriable-headers"]
    policy: dict[str, Any] = {
        "retry_on": ",".join([*conditions, *(["reset", "unavailable"] if several else [])]),
        "retriable_status_codes": [503, 507] if several else [507],
        "retriable_headers": [
            {"name": "x-worker-died", "present_match": True},
            {"name": "grpc-message", "string_match": {"prefix": "Worker died."}},
        ],
        "num_retries": 3 if several else 2,
        "retry_back_off": {"base_interval": "0.05s", "max_interval": "1s"},
    }
    route = {"cluster": cluster, "timeout": _seconds(REPLY_TIMEOUT_S), "retry_policy": policy}
    if several:
        # What a server is silent about is asked of another one too, and the first answer counts: it may be stopped, or only slow.
        route["hedge_policy"] = {"hedge_on_per_try_timeout": True}
        policy |= {
            "per_try_timeout": _seconds(SILENCE_S),
            "retry_host_predicate": [
                _typed(
                    "envoy.retry_host_predicates.previous_hosts",
                    "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                )
            ],
            "host_selection_retry_max_attempts": 30,
        }
    return route


def _local_replies() -> dict[str, Any]:
    """The proxy's own errors, in the API's form; on the routes of the Open Inference Protocol in that protocol's."""
    retry_after = {"headers_to_add": [{"header": {"key": "retry-after", "value": str(RETRY_AFTER_S)}}]}
    is_answered = {"header_filter": {"header": {"name": "x-envoy-answered", "present_match": True}}}  # by requests.lua
    body = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}, "content_type": "application/json"}
    mappers: list[dict[str, Any]] = [{"filter": is_answered, "body_format_override": body}]
    for status, (kind, message) in ERRORS.items():
        has_status = {
            "status_code_filter": {
                "comparison": {"op": "EQ", "value": {"default_value": status, "runtime_key": f"status_{status}"}}
            }
        }
        is_v2 = {"header_filter": {"header": {"name": ":path", "string_match": {"prefix": "/v2/"}}}}
        plain = {"error": {"code": status, "type": kind, "message": message}}
        in_v2 = {"error": message, "code": status, "type": kind}
        more = retry_after if status in (429, 503) else {}
        mappers += [
            {"filter": {"and_filter": {"filters": [has_status, is_v2]}}, "body_format_override": {"json_format": in_v2}} | more,
            {"filter": has_status, "body_format_override": {"json_format": plain}} | more,
        ]
    other = {"error": {"code": "%RESPONSE_CODE%", "type": "ProxyError", "message": "the request could not be passed on"}}
    return {"mappers": mappers, "body_format": {"json_format": other}}


# --- servers


def _clusters(front: Front) -> list[dict[str, Any]]:
    cluster = _cluster("torchserve", front.upstreams, front)
    replies = {"RETRY_AFTER_S": RETRY_AFTER_S, "WHOLE_REPLY_BYTES": WHOLE_REPLY_BYTES if len(front.upstreams) > 1 else 0}
    cluster["typed_extension_protocol_options"] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http_protocol_options": {}},
            # No request follows another one on a connection to TorchServe: nothing can be hidden behind one for the next.
            "common_http_protocol_options": {"max_requests_per_connection": 1},
            "http_filters": [
                _lua("replies.lua", replies),
                _typed("envoy.filters.http.upstream_codec", "envoy.extensions.filters.http.upstream_codec.v3.UpstreamCodec"),
            ],
        }
    }
    if not front.grpc_upstreams:
        return [cluster]
    grpc = _cluster("grpc", front.grpc_upstreams, front)
    grpc["typed_extension_protocol_options"] = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    return [cluster, grpc]


def _cluster(name: str, upstreams: Sequence[Address], front: Front) -> dict[str, Any]:
    are_numeric = all(upstream.port is None or is_ipv4(upstream.host) for upstream in upstreams)
    endpoints: list[dict[str, Any]] = [{"address": upstream.write()} for upstream in upstreams]
    cluster: dict[str, Any] = {
        "name": name,
        "type": "STATIC" if are_numeric else "STRICT_DNS",
        "connect_timeout": _seconds(CONNECT_TIMEOUT_S),
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {
            "thresholds": [
                {
                    # A killed server loses all that it had in flight at one stroke, and all of it is asked again.
                    **dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), MAX_REQUESTS),
                    "retry_budget": {"budget_percent": {"value": 100}, "min_retry_concurrency": MAX_CONNECTIONS},
                }
            ]
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint} for endpoint in endpoints]}],
        },
    }
    if front.upstream_ca is not None:
        cluster["transport_socket"] = _typed(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            common_tls_context={"validation_context": {"trusted_ca": {"filename": str(front.upstream_ca)}}},
        )
    if front.reference is not None:
        cluster["health_checks"] = [_health_check(front.model_name, front.reference)]
        cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}  # where no server is right, none is asked
        for endpoint, asked in zip(endpoints, front.upstreams, strict=True):
            if endpoint["address"] != asked.write():  # gRPC at an address of its own
                endpoint["health_check_config"] = {"address": asked.write()}
    if len(upstreams) > 1:
        # A server that was killed is left out at once; health checks find it dead later, and it alive again.
        cluster["outlier_detection"] = {
            "consecutive_local_origin_failure": 3,
            "split_external_local_origin_errors": True,
            "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_local_origin_failure": 100,
            "interval": "1s",
            "base_ejection_time": "3s",
            "max_ejection_time": "10s",
            "max_ejection_percent": 50,
        }
    return cluster


def is_ipv4(host: str) -> bool:
    """Tell an IPv4 address from a name."""
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        return False
    return True


def _health_check(model_name: str, reference: ReferenceAnswer) -> dict[str, Any]:
    """Ask for the digit of the archive's reference image: a server is healthy if digit and weights are the archive's.

    TorchServe's /ping says Healthy while no worker answers.
    """
    body = json.dumps({"data": reference.pixels, "prepare": "none"}, separators=(",", ":"))
    expected = [f'"weights_sha256":"{reference.weights_sha256}"']
    if reference.digit is not None:
        expected.insert(0, f'"digit":{reference.digit},')
    return {
        "timeout": "3s",
        "interval": "2s",
        "no_traffic_interval": "2s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "always_log_health_check_failures": False,
        "http_health_check": {
            "host": "front",
            "path": f"/predictions/{quote(model_name)}",
            "method": "POST",
            "request_headers_to_add": [{"header": {"key": "content-type", "value": "application/json"}}],
            "send": {"text": body.encode().hex()},
            "receive": [{"text": text.encode().hex()} for text in expected],
            "response_buffer_size": 4096,
        },
    }


def _overload_manager() -> dict[str, Any]:
    """Bounds for the whole process: connections, and memory."""

    def at(part: float) -> list[dict[str, Any]]:
        return [{"name": "envoy.resource_monitors.fixed_heap", "threshold": {"value": part}}]

    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            _typed(
                "envoy.resource_monitors.fixed_heap",
                "envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                max_heap_size_bytes=MAX_HEAP_BYTES,
            ),
            _typed(
                "envoy.resource_monitors.global_downstream_max_connections",
                "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                max_active_downstream_connections=MAX_CONNECTIONS,
            ),
        ],
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
        "actions": [
            {"name": "envoy.overload_actions.shrink_heap", "triggers": at(0.8)},
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [
                    {
                        "name": "envoy.resource_monitors.fixed_heap",
                        "scaled": {"scaling_threshold": 0.9, "saturation_threshold": 0.98},
                    }
                ],
            },
            {"name": "envoy.overload_actions.stop_accepting_requests", "triggers": at(0.95)},
            {
                "name": "envoy.overload_actions.reduce_timeouts",  # the fewer places are left, the sooner idle connections end
                "triggers": [
                    {
                        "name": "envoy.resource_monitors.global_downstream_max_connections",
                        "scaled": {"scaling_threshold": 0.5, "saturation_threshold": 0.9},
                    }
                ],
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.overload.v3.ScaleTimersOverloadActionConfig",
                    "timer_scale_factors": [
                        {"timer": "HTTP_DOWNSTREAM_CONNECTION_IDLE", "min_timeout": _seconds(MIN_IDLE_TIMEOUT_S)}
                    ],
                },
            },
        ],
    }

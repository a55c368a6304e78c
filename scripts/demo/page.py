"""The page's own server: static files, and a proxy for two routes of a served model.

The browser talks to this server alone. It forwards `POST /explanation` to the model's explanations route and `GET /description`
to the management API, adds the token, and lets nothing else through: requests of other pages (by Host, Origin and
Sec-Fetch-Site), bodies and replies that are too large, and answers that take too long end here. Knows nothing of processes or the
command line.
"""

import asyncio
import contextlib
import json
import shlex
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scripts.serving.credentials import CredentialsError, authorization, read_token

STATIC = Path(__file__).parent / "static"
LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")  # that a browser may know the page by
MAX_BODY_BYTES = 32 * 1024 * 1024  # as many as TorchServe takes (serve_config/config.properties)
MAX_REPLY_BYTES = 32 * 1024 * 1024  # as many as TorchServe sends
BODY_TIMEOUT_S = 10  # for a request to be there whole
CONNECT_TIMEOUT_S = 3
REPLY_TIMEOUT_S = 30  # for an answer to be there whole; the slowest accepted requests take a few seconds
MAX_FORWARDED = 8  # requests in flight; a page has one or two, and a browser opens six connections
START_TIMEOUT_S = 10  # for the page's own server, which loads nothing

# Nothing but the page's own files and its own server. Strings never become code or markup.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class PageError(RuntimeError):
    """The page cannot be served; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A served model, and what it takes to ask it.

    Attributes:
        url: address of the inference API, such as http://127.0.0.1:8080.
        model: its name.
        management_url: address of the management API, which describes the model; None where it cannot be reached.
        key_file: holds the token: TorchServe's key_file.json, or a token alone. It is read again when the token is refused.
        ca_file: certificates to trust, PEM, instead of the system's.
        is_starting: whether the server is being started and cannot be asked yet.
    """

    url: str
    model: str
    management_url: str | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    is_starting: Callable[[], bool] = lambda: False

    @property
    def explanations_url(self) -> str:
        """The route that explains."""
        return f"{self.url}/explanations/{quote(self.model, safe='')}"


class UpstreamError(RuntimeError):
    """The model gave no answer.

    Attributes:
        status: of the reply to the page.
        type: for the page, which has words for it.
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.type = kind

    def response(self) -> JSONResponse:
        """The reply to the page, in the form of the model's own errors."""
        return JSONResponse({"error": {"code": self.status, "type": self.type, "message": str(self)}}, self.status)


# --- who may ask


class OwnOriginOnly:
    """ASGI middleware that answers the page itself and nobody else.

    Another page can make a browser send requests here, under the address of this machine or, by DNS rebinding, under a name of
    its own. Host must be one of this server's own names. What reaches the model must come from this page's scripts: browsers say
    so in Origin and Sec-Fetch-Site, which no script can set.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":  # the lifespan; of web sockets there are none
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self._refuse(scope["method"], scope["path"], Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refuse(self, method: str, path: str, headers: Headers) -> Response | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return UpstreamError(421, "WrongHost", "this page answers under its own address alone").response()
        origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
        own = f"http://{hosts[0].lower()}"
        is_foreign = any(origin != own for origin in origins) or any(site == "cross-site" for site in sites)
        is_page = method in ("GET", "HEAD") and path in ("/", "/index.html")
        if is_page and "origin" not in headers:  # a link from elsewhere may lead here; frames are refused by the headers above
            return None
        is_forwarded = path.rstrip("/") in ("/explanation", "/description")
        if is_foreign or (is_forwarded and not (method in ("GET", "HEAD") or origins)) or any(s == "same-site" for s in sites):
            return UpstreamError(403, "OtherOrigin", "this page answers its own scripts alone").response()
        return None


# --- what is forwarded


class Proxy:
    """Asks the model for the page."""

    def __init__(self, served: ServedModel, client: httpx.AsyncClient) -> None:
        self._served = served
        self._client = client
        self._slots = asyncio.Semaphore(MAX_FORWARDED)

    async def explain(self, request: Request) -> Response:
        """Forward one image with its options."""
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise UpstreamError(415, "WrongContentType", "expected a body of type application/json")
            body = await _read_body(request)
            call = self._ask("POST", self._served.explanations_url, "inference", body)
            return await _unless_disconnected(request, call)
        except UpstreamError as error:
            return error.response()
        except ClientDisconnect:
            return Response(status_code=499)

    async def describe(self, request: Request) -> Response:
        """Ask the management API what the model says of itself."""
        try:
            if self._served.management_url is None:
                raise UpstreamError(404, "NoDescription", "this server's management API is not known: give --management-url")
            url = f"{self._served.management_url}/models/{quote(self._served.model, safe='')}?customized=true"
            response = await _unless_disconnected(request, self._ask("GET", url, "management"))
            return _description_in(response) if response.status_code == 200 else response
        except UpstreamError as error:
            return error.response()

    async def settings(self, request: Request) -> Response:
        """Tell the page how others ask the same model: what its curl commands start with. No secret is in it."""
        return JSONResponse({"model": self._served.model, "url": self._served.url, "curl": curl_prefix(self._served)})

    async def _ask(self, method: str, url: str, role: str, body: bytes | None = None) -> Response:
        """Send one request; with a new token where the old one is refused.

        Raises:
            UpstreamError: there is no answer, or not one of this API.
        """
        if self._served.is_starting():
            raise UpstreamError(503, "Starting", "the server is starting")
        if self._slots.locked():
            raise UpstreamError(503, "Overloaded", "too many requests are in flight")
        async with self._slots:
            token = await self._token(role)
            response = await self._send(method, url, token, body)
            if _is_refused_token(response):
                renewed = await self._token(role)
                if renewed != token:
                    response = await self._send(method, url, renewed, body)
            if _is_refused_token(response):
                raise UpstreamError(401, "TokenRefused", "the server does not accept the token")
        return response

    async def _token(self, role: str) -> str | None:
        if self._served.key_file is None:
            return None
        try:
            return await asyncio.to_thread(read_token, self._served.key_file, role)
        except CredentialsError as error:
            raise UpstreamError(401, "NoToken", str(error)) from error

    async def _send(self, method: str, url: str, token: str | None, body: bytes | None) -> Response:
        headers = {"Accept": "application/json", **authorization(token)}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S), self._client.stream(method, url, content=body, headers=headers) as reply:
                content = bytearray()
                async for chunk in reply.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_REPLY_BYTES:
                        raise UpstreamError(502, "NotThisService", f"expected a reply of at most {MAX_REPLY_BYTES:,} bytes")
        except (TimeoutError, httpx.TimeoutException) as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise UpstreamError(502, "Unreachable", f"no server answers at {_origin_of(url)}") from error
            raise UpstreamError(504, "NoAnswer", f"no answer within {REPLY_TIMEOUT_S} s") from error
        except httpx.ConnectError as error:
            if isinstance(_root_of(error), ssl.SSLError):
                raise UpstreamError(502, "WrongCertificate", f"{_origin_of(url)} has no trusted certificate") from error
            raise UpstreamError(502, "Unreachable", f"no server answers at {_origin_of(url)}") from error
        except httpx.HTTPError as error:
            raise UpstreamError(502, "Unreachable", f"{_origin_of(url)} ended the connection") from error
        try:
            json.loads(content)
        except ValueError as error:
            if reply.status_code >= 400:  # of a proxy in front of the model, in its own form
                return UpstreamError(reply.status_code, "HTTPError", reply.reason_phrase).response()
            raise UpstreamError(502, "NotThisService", f"{_origin_of(url)} does not answer as this API does") from error
        return Response(bytes(content), reply.status_code, media_type="application/json")


async def _read_body(request: Request) -> bytes:
    """Read a request's body.

    Raises:
        UpstreamError: it is too large, or too slow.
    """
    body = bytearray()
    too_large = UpstreamError(413, "RequestTooLarge", f"expected at most {MAX_BODY_BYTES:,} bytes")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise UpstreamError(408, "SlowRequest", f"expected a whole request within {BODY_TIMEOUT_S} s") from error
    return bytes(body)


async def _unless_disconnected(request: Request, call: Awaitable[Response]) -> Response:
    """Wait for an answer, and stop asking when the page no longer wants it: it has a newer question."""
    asking = asyncio.ensure_future(call)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            return Response(status_code=499)  # nobody reads it
        return asking.result()
    finally:
        for task in (asking, leaving):
            task.cancel()
        await asyncio.gather(asking, leaving, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_refused_token(response: Response) -> bool:
    """Whether TorchServe (400) or a proxy in front of it (401, 403) refuses the token."""
    if response.status_code in (401, 403):
        return True
    return response.status_code == 400 and json.loads(bytes(response.body)).get("type") == "InvalidKeyException"


def _description_in(response: Response) -> Response:
    try:
        (version,) = json.loads(bytes(response.body))
        description: Any = version["customizedMetadata"]
        return JSONResponse(json.loads(description) if isinstance(description, str) else description)
    except (ValueError, KeyError, TypeError) as error:
        raise UpstreamError(502, "NotThisService", "the server does not describe itself as this API does") from error


def _origin_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _root_of(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def curl_prefix(served: ServedModel) -> list[str]:
    """Write what a shell command starts and ends with that sends JSON to the model: [before the JSON, after it].

    It names the files of the token and the certificates, and reads the token at the time that it runs: no secret stands in it.
    """
    start = ["curl"]
    if served.ca_file is not None:
        start += ["--cacert", shlex.quote(str(served.ca_file.resolve()))]
    pipe = ""
    if served.key_file is not None:
        file = shlex.quote(str(served.key_file.resolve()))
        read = f"""jq -j '"Authorization: Bearer " + .inference.key' {file}"""
        if served.key_file.suffix != ".json":
            read = f"sed 's/^/Authorization: Bearer /' {file}"
        pipe = f"{read} | "
        start += ["-H", "@-"]
    return [f"{pipe}{' '.join(start)} --json", shlex.quote(served.explanations_url)]


# --- the server


def build_app(served: ServedModel, port: int) -> ASGIApp:
    """Put the page together.

    Args:
        served: the model that it shows.
        port: that it will listen on.
    """
    trust = ssl.create_default_context(cafile=served.ca_file) if served.ca_file else ssl.create_default_context()
    # No environment: a proxy named there would get the token. No redirects: they could lead to another server.
    client = httpx.AsyncClient(
        verify=trust, trust_env=False, timeout=httpx.Timeout(REPLY_TIMEOUT_S, connect=CONNECT_TIMEOUT_S), follow_redirects=False
    )
    proxy = Proxy(served, client)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    routes = [
        Route("/explanation", proxy.explain, methods=["POST"]),
        Route("/description", proxy.describe, methods=["GET"]),
        Route("/settings.json", proxy.settings, methods=["GET"]),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    return OwnOriginOnly(Starlette(routes=routes, lifespan=lifespan), port)


@contextlib.contextmanager
def serving_page(served: ServedModel, port: int) -> Iterator[str]:
    """Serve the page in a thread of its own; inside it the page answers.

    Args:
        served: the model that it shows.
        port: TCP port on 127.0.0.1.
    Returns:
        the page's address.
    Raises:
        PageError: the port is taken, or the certificates cannot be read.
    """
    try:
        app = build_app(served, port)
    except OSError as error:  # ssl.SSLError is one
        raise PageError(f"cannot read certificates from {served.ca_file}: {error}") from error
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=LOOPBACK,
            port=port,
            log_level="critical",  # its log would hold addresses; what goes wrong stands in the replies
            access_log=False,
            server_header=False,
            ws="none",
            http="h11",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            limit_concurrency=64,
        )
    )
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001  # uvicorn raises SystemExit where the port is taken
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if failures or not thread.is_alive() or time.monotonic() > deadline:
            raise PageError(f"port {port} is taken; choose another with --port")
        time.sleep(0.01)
    try:
        yield f"http://{LOOPBACK}:{port}/"
    finally:
        server.should_exit = True
        thread.join(timeout=START_TIMEOUT_S)

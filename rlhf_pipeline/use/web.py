"""What the small servers share, `serve` and the page of `label` and `arena`: addresses, JSON in, errors out."""

import errno
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from rlhf_pipeline.errors import InputError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVERY_ADDRESS = ("0.0.0.0", "::")
NOT_AS_JSON = "the request should be JSON, with `Content-Type: application/json`"


class Refused(Exception):  # noqa: N818  it is an answer
    """What was asked for is not done.

    Args:
        status: of HTTP.
        sentence: why.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


# Addresses


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: the address to open, by number or name.
        port: of it; 0 for any that is free.

    Raises:
        InputError: the address cannot be opened.
    """
    place = f"--host {host or repr(host)}"
    hint = "127.0.0.1 is for this machine alone, and 0.0.0.0 for all of its addresses"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError("there is no such address", place=place, hint=hint) from None
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError("this machine has no such address", place=place, hint=hint) from None
        what = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error.strerror}"
        hint = "`--port 0` takes one that is free"
        raise InputError(f"port {port} {what}", place=f"--port {port}", hint=hint) from None
    return found


def reached_at(host: str) -> str:
    """An address at which others reach what was opened for `host`: of all addresses of this machine, one.

    It is this machine's number in its network, as far as it knows it; nothing is sent for it.
    """
    if host not in EVERY_ADDRESS:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # which is nobody's (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def url(host: str, port: int) -> str:
    """What to open, without a path."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def host_name(header: str) -> str:
    """The name or number in a `Host`, in small letters; nothing where it has none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


# Requests and answers


def is_json(content_type: str) -> bool:
    """Whether a `Content-Type` says JSON. Pages of somebody else's may not send that without being asked first."""
    return content_type.partition(";")[0].strip().lower() == "application/json"


async def json_object(request: Request, largest: int, too_large: str, **options: Any) -> dict[str, Any]:
    """The JSON object that was sent.

    Args:
        request: whose body is read.
        largest: how many bytes it may have.
        too_large: what to say where it has more.
        options: of `json.loads`.

    Raises:
        Refused: it is none, or too large.
    """
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > largest:
            raise Refused(413, too_large)
    try:
        found = json.loads(content, **options)
    except (ValueError, RecursionError):
        raise Refused(400, "this is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "this is no JSON object")
    return found


def error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """What is refused, as {error: sentence}."""
    return JSONResponse({"error": sentence}, status, headers)


def handlers(nothing_here: str, headers: Mapping[int, Mapping[str, str]]) -> dict[Any, Callable[..., Any]]:
    """What Starlette's `exception_handlers` should be, so that every error is {error: sentence}.

    Args:
        nothing_here: what a path is answered with that leads nowhere.
        headers: those that an answer has, by its status.
    """

    async def refused(_: Request, problem: Exception) -> Response:
        assert isinstance(problem, Refused)
        return error(problem.status, problem.sentence, headers.get(problem.status))

    async def of_http(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        beside = {**(problem.headers or {}), **headers.get(problem.status_code, {})}
        sentence = {
            404: nothing_here,
            405: f"{request.url.path} takes {beside.get('Allow', 'another method')}, and not {request.method}",
        }.get(problem.status_code, problem.detail)
        return error(problem.status_code, sentence, beside)

    async def failed(_: Request, problem: Exception) -> Response:
        return error(500, f"the server has failed: {type(problem).__name__}")

    return {Refused: refused, HTTPException: of_http, Exception: failed}


def server(app: ASGIApp, last_s: int) -> uvicorn.Server:
    """A server that prints nothing of its own.

    Args:
        app: what answers.
        last_s: for so long requests are still answered when it is to stop, in seconds.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=last_s,
    )
    return uvicorn.Server(config)

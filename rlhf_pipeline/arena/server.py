"""The page and its JSON over HTTP: for those alone who have a link, and at the address alone that it was opened for.

    GET  /?token=…     the link that the command prints: sets a cookie, and goes on to the page
    GET  /             the page, and /static/NAME what it needs
    GET  /api/session  all that the page shows; GET /api/next the pair alone
    POST /api/label    {id, ask, choice, dimensions, reason, seconds}: answered when it is on the disk
    POST /api/undo     {} or {label}
    GET  /api/drift    ?beta=0.5
    GET  /api/people   for the owner

What is refused is {error: sentence}: 400 it is no such request, 401 without a link, 403 from elsewhere, 404, 409 the
pair is not that person's any more, 413 too large, 500 it cannot be saved.
"""

import ipaddress
import math
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_pipeline.arena.session import BETA, Session
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.labels import Labels, Person
from rlhf_pipeline.use import web
from rlhf_pipeline.use.web import EVERY_ADDRESS, LOOPBACK, Refused

PAGE = Path(__file__).with_name("page")
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LARGEST_BODY = 65_536  # bytes
LONGEST_TOKEN = 200  # characters of one that somebody sends
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
NO_LINK = "open the link that `rlhf-pipeline` has printed: without it nobody comes in"


def new_token() -> str:
    """A token for a link: 192 bits of chance."""
    return secrets.token_urlsafe(24)


def link(host: str, port: int, token: str) -> str:
    """The link that opens the page."""
    return f"{web.url(host, port)}/?token={token}"


def app(session: Session, labels: Labels, host: str, port: int) -> ASGIApp:
    """The application.

    Args:
        session: what is asked, and of whom.
        labels: who holds which token.
        host: the address that it was opened for.
        port: of it; cookies of pages on other ports of a machine would mix.
    """
    return _Guard(_Pages(session, labels, port).app, host)


class _Pages:
    """The routes."""

    def __init__(self, session: Session, labels: Labels, port: int) -> None:
        self.session, self.labels, self.cookie = session, labels, f"arena-{port}"
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/static/{name}", self.static),
                Route("/api/session", self.state),
                Route("/api/next", self.next),
                Route("/api/drift", self.drift),
                Route("/api/people", self.people),
                Route("/api/label", self.label, methods=["POST"]),
                Route("/api/undo", self.undo, methods=["POST"]),
            ],
            exception_handlers=web.handlers("there is nothing here", {}) | {InputError: _unsaved},
        )

    async def page(self, request: Request) -> Response:
        token = request.query_params.get("token")
        if token is not None:
            if await self._person_of(token) is None:
                return HTMLResponse(_note(NO_LINK), 401)
            # No redirect: after a link in a chat, browsers would send no cookie along that is for this site alone.
            answer = HTMLResponse(_note("The page opens.", refresh=True))
            answer.set_cookie(self.cookie, token, httponly=True, samesite="strict", path="/", max_age=90 * 86_400)
            return answer
        if await self._person_of(request.cookies.get(self.cookie)) is None:
            return HTMLResponse(_note(NO_LINK), 401)
        return HTMLResponse((PAGE / "index.html").read_text(encoding="utf-8"))

    async def static(self, request: Request) -> Response:
        await self._person(request)
        name = request.path_params["name"]
        found = {file.name: file for file in PAGE.iterdir() if file.suffix in TYPES}.get(name)
        if found is None:
            raise Refused(404, "there is no such file")
        return Response(found.read_bytes(), media_type=TYPES[found.suffix])

    async def state(self, request: Request) -> Response:
        person = await self._person(request)
        return await _answer(self.session.state, person.name, person.is_owner)

    async def next(self, request: Request) -> Response:
        person = await self._person(request)
        return await _answer(self.session.next, person.name)

    async def drift(self, request: Request) -> Response:
        person = await self._person(request)
        try:
            beta = float(request.query_params.get("beta", BETA))
        except ValueError:
            beta = math.nan
        if not beta > 0 or math.isinf(beta):
            raise Refused(400, "`beta` should be a number above 0")
        return await _answer(self.session.drift, person.name, beta)

    async def people(self, request: Request) -> Response:
        person = await self._person(request)
        if not person.is_owner:
            raise Refused(403, "this is for who has started the page")
        return await _answer(self.session.about_people)

    async def label(self, request: Request) -> Response:
        person = await self._person(request)
        return await _answer(self.session.label, person.name, await _body(request))

    async def undo(self, request: Request) -> Response:
        person = await self._person(request)
        return await _answer(self.session.undo, person.name, await _body(request))

    async def _person(self, request: Request) -> Person:
        person = await self._person_of(request.cookies.get(self.cookie))
        if person is None:
            raise Refused(401, NO_LINK)
        return person

    async def _person_of(self, token: str | None) -> Person | None:
        """Who holds a token, and is one of the people of this session."""
        if not token or len(token) > LONGEST_TOKEN:
            return None
        person = await run_in_threadpool(self.labels.person, token)
        return person if person and person.name in self.session.people else None


async def _answer(do: Callable[..., Any], *arguments: Any) -> Response:
    return JSONResponse(await run_in_threadpool(do, *arguments))


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent.

    Raises:
        Refused: it is none, or too large.
    """
    too_large = f"a request may have {LARGEST_BODY} bytes"
    return await web.json_object(request, LARGEST_BODY, too_large, parse_constant=_no_number)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class _Guard:
    """What every request has to pass, and what every answer says.

    A page of somebody else's in the same browser can send requests here, and a name of theirs can be made to lead here
    (DNS rebinding). So the `Host` has to be an address that this was opened for; and a request that changes something
    has to come from a page of this origin, and to be JSON, which other pages may not send.

    Args:
        pages: what answers.
        host: the address that it was opened for.
    """

    def __init__(self, pages: ASGIApp, host: str) -> None:
        self.pages, self.host = pages, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.pages(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(scope["method"], headers)
        if problem is not None:
            await web.error(*problem)(scope, receive, with_headers)
        else:
            await self.pages(scope, receive, with_headers)

    def _problem(self, method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """The status and the sentence for a request that is refused."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 403, "this address is not the one that the page was opened for"
        if method in ("GET", "HEAD"):
            return None
        if headers.get("origin") != f"http://{host}":
            return 403, "this request does not come from the page"
        if not web.is_json(headers.get("content-type", "")):
            return 400, web.NOT_AS_JSON
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a `Host` is the address that this was opened for, with any port: it may lie behind a tunnel."""
        name = web.host_name(host)
        if self.host in EVERY_ADDRESS:  # no name of somebody else's, but any number
            return name in (*LOOPBACK, socket.gethostname().lower(), socket.getfqdn().lower()) or _is_number(name)
        return name == self.host.lower() or (name in LOOPBACK and self.host in LOOPBACK)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _unsaved(_: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return web.error(500, error.message)


def _note(text: str, refresh: bool = False) -> str:
    """A page of one sentence; with `refresh` it goes on to the page at once."""
    head = '<meta http-equiv="refresh" content="0; url=/">' if refresh else ""
    body = f"<p>{text}</p>{'<p><a href=/>rlhf-pipeline</a></p>' if refresh else ''}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{head}<link rel="icon" href="data:,">'
        "<title>rlhf-pipeline</title></head>"
        f"<body>{body}</body></html>"
    )

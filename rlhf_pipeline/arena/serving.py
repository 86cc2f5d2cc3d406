"""The page from its start to Ctrl-C: an address, links for people, and a clean end."""

import contextlib
import errno
import getpass
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from rlhf_pipeline.arena.server import EVERY_ADDRESS, LOOPBACK, app, link, new_token
from rlhf_pipeline.arena.session import Session
from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.labels import Labels

NAME = re.compile(r"[^\W_][\w .@-]{0,39}")
UNNAMED = "owner"


def names_of(text: str | None) -> list[str]:
    """The names in `alice,bob`.

    Raises:
        InputError: one is none, or stands there twice.
    """
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if not NAME.fullmatch(name):
            hint = "letters, digits, spaces, and any of _ . @ -; at most 40"
            raise InputError(f"{name!r} is no name for a person", place="--people", hint=hint)
        if names.count(name) > 1:
            raise InputError(f"{name} stands there twice", place="--people")
    return names


def owner_name(others: Sequence[str]) -> str:
    """The name of who starts the page: that of the account, unless one of the others has it."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = UNNAMED
    return next(one for one in (name, UNNAMED, f"{UNNAMED} 2") if one not in others and NAME.fullmatch(one))


def serve(
    setup: Setup,
    labels: Labels,
    people: Sequence[str],
    *,
    host: str,
    port: int,
    print_link: Callable[[str], None],
    say: Callable[[str], None],
    show: Callable[[str], None] | None,
) -> None:
    """Show the page until Ctrl-C, or SIGTERM.

    Args:
        setup: what is asked.
        labels: where the answers go.
        people: the names of those who get a link of their own, beside who starts it.
        host: the address to open.
        port: of it; 0 for any that is free.
        print_link: takes each link, and the name before those of people.
        say: takes a line.
        show: opens a link in a browser; None to open none.

    Raises:
        InputError: the address cannot be opened.
    """
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    owner = owner_name(people)
    session = Session(setup, labels, [owner, *people])
    shown = _address() if host in EVERY_ADDRESS else host
    links = {}
    for name in (owner, *people):
        token = new_token()
        labels.admit(name, token, is_owner=name == owner)
        links[name] = link(shown, port, token)
        print_link(links[name] if name == owner else f"{name} {links[name]}")
    if host not in LOOPBACK:
        say(
            f"warning: this opens the page for every machine that reaches {shown}, over plain HTTP: who has a link "
            "reads the prompts and replies and labels as that person, and who listens on the network gets the link"
        )
    say(f"{session.progress(owner)['text']}; Ctrl-C ends, and every label is saved as it is made")
    config = uvicorn.Config(
        app(session, labels, host, port),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
    )
    try:
        with _ended_by_signals():
            if show:
                show(links[owner])  # the socket listens already
            uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        listening.close()
        session.close()
    progress = session.progress(owner)
    go_on = f"; `{setup.command}` goes on with them" if progress["reached"] and setup.command else ""
    say(f"stopped: {progress['text']}{go_on}")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and a closed terminal end the block as Ctrl-C does."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"there is no such address: {error.strerror}", place=f"--host {host}") from None
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        what = f"port {port} is taken" if taken else f"port {port} of {host} cannot be opened: {error}"
        raise InputError(what, place=f"--port {port}", hint="`--port 0` takes one that is free") from None
    return found


def _address() -> str:
    """The number of this machine in its network, as far as it knows it; nothing is sent for it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # which is nobody's (RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()

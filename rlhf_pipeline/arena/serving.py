"""The page from its start to Ctrl-C: an address, links for people, and a clean end."""

import contextlib
import getpass
import re
import signal
from collections.abc import Callable, Iterator, Sequence

from rlhf_pipeline.arena.server import app, link, new_token
from rlhf_pipeline.arena.session import Session
from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.rundir.labels import Labels
from rlhf_pipeline.use import web

NAME = re.compile(r"[^\W_][\w .@-]{0,39}")
UNNAMED = "owner"
LAST_S = 3  # for so long requests are still answered when it is to stop


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
    listening = web.listen(host, port)
    port = listening.getsockname()[1]
    owner = owner_name(people)
    session = Session(setup, labels, [owner, *people])
    shown = web.reached_at(host)
    links = {}
    for name in (owner, *people):
        token = new_token()
        labels.admit(name, token, is_owner=name == owner)
        links[name] = link(shown, port, token)
        print_link(links[name] if name == owner else f"{name} {links[name]}")
    if host not in web.LOOPBACK:
        say(
            f"warning: this opens the page for every machine that reaches {shown}, over plain HTTP: who has a link "
            "reads the prompts and replies and labels as that person, and who listens on the network gets the link"
        )
    say(f"{session.progress(owner)['text']}; Ctrl-C ends, and every label is saved as it is made")
    try:
        with _ended_by_signals():
            if show:
                show(links[owner])  # the socket listens already
            web.server(app(session, labels, host, port), LAST_S).run(sockets=[listening])
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

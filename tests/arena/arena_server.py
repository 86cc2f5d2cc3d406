"""A real server in a process of its own, and people who click in browsers of their own."""

import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

COMMAND = [sys.executable, "-m", "rlhf_pipeline"]


class Server:
    """A command that shows the page, up to its links.

    Args:
        arguments: of `rlhf-pipeline`.
        folder: where it starts.

    Attributes:
        links: by the names of people, the owner's under "".
    """

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.links: dict[str, str] = {}
        assert self.process.stdout is not None
        people = arguments[arguments.index("--people") + 1].split(",") if "--people" in arguments else []
        for _ in ["", *people]:
            line = self.process.stdout.readline().strip()
            if not line:
                raise RuntimeError(self.process.communicate()[1])
            name, _, link = line.rpartition(" ")
            self.links[name] = link

    def end(self, signal: int) -> tuple[int, str]:
        """Send a signal; the exit code and what was said on standard error."""
        self.process.send_signal(signal)
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said


@contextmanager
def serving(*arguments: str, folder: Path) -> Iterator[Server]:
    """A server that does not outlive the block."""
    server = Server(list(arguments), folder)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


class Browser:
    """A person's browser: it has a cookie, and sends a click again until it is answered.

    Args:
        link: that opens the page.
    """

    def __init__(self, link: str) -> None:
        self.address = link.partition("/?")[0]
        self.client = httpx2.Client(base_url=self.address, headers={"origin": self.address}, timeout=20, verify=False)
        self.acknowledged: list[str] = []
        self.next: dict[str, Any] | None = None
        assert self.client.get(link).status_code == 200

    def ask(self) -> dict[str, Any] | None:
        answer = self.client.get("/api/next")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def click(self, choice: str = "left", until: float = 20.0) -> dict[str, Any] | None:
        """Label the pair on the page; what the server said, None where there was no pair.

        As the page does, the same request is repeated while the server does not answer.
        """
        body, deadline = None, time.monotonic() + until
        while True:
            try:
                if body is None:
                    self.next = self.next or self.ask()
                    if self.next is None:
                        return None
                    body = {"id": str(uuid.uuid4()), "ask": self.next["id"], "choice": choice, "seconds": 0.1}
                answer = self.client.post("/api/label", json=body)
            except httpx2.TransportError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
                continue
            assert answer.status_code == 200, answer.text
            assert answer.json()["saved"] is True
            self.acknowledged.append(body["id"])
            self.next = answer.json()["ask"]
            return answer.json()


def together(browsers: list[Browser], work: Any) -> None:
    """Run `work(browser)` for all of them at once; what one raises is raised."""
    failed: list[BaseException] = []

    def guarded(browser: Browser) -> None:
        try:
            work(browser)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(browser,)) for browser in browsers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def port_of(link: str) -> str:
    found = re.search(r":(\d+)/", link)
    assert found is not None
    return found[1]

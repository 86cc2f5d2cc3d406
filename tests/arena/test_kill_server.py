"""No click is lost and none is there twice, however the server ends."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from arena_server import Browser, Server, port_of, together

from rlhf_pipeline.rundir.labels import Labels

pytestmark = pytest.mark.slow

CLICKS, PEOPLE = 1000, 20


def test_a_thousand_clicks_from_twenty_browsers_survive_a_kill(tmp_path: Path) -> None:
    """Each browser sends a click again until it is answered, as the page does."""
    rows = [{"prompt": f"p {number}", "replies": ["a", "b"]} for number in range(CLICKS + PEOPLE)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = [f"p{number}" for number in range(PEOPLE)]
    arguments = ["arena", "--data", "rows.jsonl", "--people", ",".join(names)]
    servers = [Server(arguments, tmp_path)]
    port = port_of(servers[0].links[""])
    browsers = [Browser(servers[0].links[name]) for name in names]

    def kill() -> None:
        while sum(len(browser.acknowledged) for browser in browsers) < CLICKS / 2:
            time.sleep(0.005)
        servers[0].process.kill()
        servers[0].process.wait()
        servers.append(Server([*arguments, "--port", port], tmp_path))

    killer = threading.Thread(target=kill)
    killer.start()
    together(browsers, lambda browser: [browser.click() for _ in range(CLICKS // PEOPLE)])
    killer.join()
    # What was acknowledged is there also after a kill at the very end.
    servers[-1].process.kill()
    for server in servers:
        server.process.communicate()
    assert [server.process.returncode for server in servers] == [-signal.SIGKILL] * 2
    acknowledged = [id_ for browser in browsers for id_ in browser.acknowledged]
    assert len(acknowledged) == len(set(acknowledged)) == CLICKS
    with Labels(tmp_path / "rows.jsonl.labels.db") as labels:
        kept = labels.of("arena", undone=True)
    assert sorted(label.id for label in kept) == sorted(acknowledged)
    for name in names:
        own = [label.pair for label in kept if label.person == name and label.how != "again"]
        assert len(set(own)) == len(own)  # and nobody has labelled a pair twice because of it

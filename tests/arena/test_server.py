"""Who comes in and who does not, and that nothing of what people or models write can run in the page."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from rlhf_pipeline.arena import server
from rlhf_pipeline.arena import session as sessions
from rlhf_pipeline.arena.session import Session
from rlhf_pipeline.arena.sources import Setup
from rlhf_pipeline.rundir.items import item
from rlhf_pipeline.rundir.labels import Labels

SCRIPT = "<script>alert(1)</script>"
ITEMS = [item(f"{SCRIPT} {number}", [f"a {SCRIPT}", f"b {SCRIPT}"]) for number in range(20)]
PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def labels(tmp_path: Path) -> Iterator[Labels]:
    with Labels(tmp_path / "labels.db") as labels:
        labels.admit("me", "owner's token", is_owner=True)
        labels.admit("anna", "anna's token")
        labels.admit("gone", "token of somebody who was asked another time")
        yield labels


@pytest.fixture
def session(labels: Labels) -> Iterator[Session]:
    session = Session(Setup(f"Run {SCRIPT}", "label", ITEMS), labels, ["me", "anna"])
    yield session
    session.close()


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch) -> None:
    """A page of its own, so that these tests are of the server alone."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name, text in (("index.html", "<p>the page"), ("arena.js", "1"), ("arena.css", "p{}"), ("secret.txt", "no")):
        (folder / name).write_text(text, encoding="utf-8")
    (tmp_path / "secret.js").write_text("no", encoding="utf-8")
    monkeypatch.setattr(server, "PAGE", folder)


def client(session: Session, labels: Labels, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    made = TestClient(server.app(session, labels, host, PORT), base_url=HERE, raise_server_exceptions=False)
    made.headers["origin"] = HERE
    if token:
        assert made.get("/", params={"token": token}).status_code == 200
    return made


@pytest.fixture
def anna(session: Session, labels: Labels) -> TestClient:
    return client(session, labels, "anna's token")


def click(browser: TestClient, **more: Any) -> Any:
    ask = browser.get("/api/next").json()
    body = {"id": str(uuid.uuid4()), "ask": ask["id"], "choice": "left"} | more
    return browser.post("/api/label", json=body)


def test_the_link_opens_the_page_and_all_it_needs(anna: TestClient) -> None:
    assert anna.get("/").text == "<p>the page"
    assert anna.get("/static/arena.js").headers["content-type"].startswith("text/javascript")
    assert anna.get("/static/arena.css").headers["content-type"].startswith("text/css")
    assert anna.get("/api/session").json()["person"] == "anna"
    answer = click(anna).json()
    assert answer["saved"] and answer["ask"]["number"] == 2
    assert anna.post("/api/undo", json={}).json()["saved"]
    assert anna.get("/api/drift").json() is None


def test_all_that_is_learned_can_be_sent(labels: Labels, monkeypatch) -> None:
    monkeypatch.setattr(sessions, "WAIT_S", 30)
    features = np.array([[float(len(reply) + number)] for number in range(20) for reply in "ab"], np.float32)
    session = Session(Setup("t", "label", ITEMS, features=features), labels, ["anna"])
    try:
        anna = client(session, labels, "anna's token")
        for _ in range(12):
            answer = click(anna)
            assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["learner"]["accuracy"] is not None and found["learner"]["calibration"]
        assert set(found["learner"]["calibration"][0]) == {"from", "to", "n", "said", "true"}
        assert found["drift"]["candidates"] and found["belief"]
        assert anna.get("/api/session").json()["learner"] == found["learner"]
        assert anna.get("/api/drift?beta=2").json()["beta"] == 2
    finally:
        session.close()


def test_the_cookie_is_for_this_page_alone(session: Session, labels: Labels) -> None:
    answer = client(session, labels).get("/?token=anna's token")
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"arena-{PORT}=") and "httponly" in cookie and "samesite=strict" in cookie
    assert '<meta http-equiv="refresh" content="0; url=/">' in answer.text
    assert "anna" not in answer.text


EVERYTHING = [
    ("GET", "/"), ("GET", "/static/arena.js"), ("GET", "/api/session"), ("GET", "/api/next"), ("GET", "/api/drift"),
    ("GET", "/api/people"), ("POST", "/api/label"), ("POST", "/api/undo"),
]  # fmt: skip


@pytest.mark.parametrize("token", [None, "", "wrong", "token of somebody who was asked another time", "x" * 50_000])
@pytest.mark.parametrize(("method", "path"), EVERYTHING)
def test_without_a_token_of_these_people_nothing_is_told(
    session: Session, labels: Labels, method: str, path: str, token: str | None
) -> None:
    browser = client(session, labels)
    if token:
        assert browser.get("/", params={"token": token}).status_code == 401
        browser.cookies.set(f"arena-{PORT}", token)
    answer = browser.request(method, path, json={} if method == "POST" else None)
    assert answer.status_code == 401
    for text in ("prompt", "alert", "anna", "the page</p>"):
        assert text not in answer.text


def test_a_cookie_of_another_port_is_none_here(session: Session, labels: Labels) -> None:
    browser = client(session, labels)
    browser.cookies.set("arena-9999", "anna's token")
    assert browser.get("/api/session").status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1.evil.example", "", "[::1", "10.0.0.1"]
)
def test_another_host_is_refused(anna: TestClient, host: str) -> None:
    """As a name of somebody else's that was made to lead here (DNS rebinding)."""
    for path in ("/", "/?token=anna's token", "/api/session", "/static/arena.js"):
        answer = anna.get(path, headers={"host": host})
        assert answer.status_code == 403 and "prompt" not in answer.text and "set-cookie" not in answer.headers


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "[::1]:5", "LOCALHOST"])
def test_this_machine_by_other_names_and_through_a_tunnel_is_taken(anna: TestClient, host: str) -> None:
    assert anna.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("host", "taken"), [("192.168.0.7:80", True), ("[fe80::1]:80", True), ("localhost", True), ("evil.example", False)]
)
def test_all_addresses_take_numbers_and_no_names_of_others(
    session: Session, labels: Labels, host: str, taken: bool
) -> None:
    browser = client(session, labels, "anna's token", host="0.0.0.0")
    assert (browser.get("/", headers={"host": host}).status_code == 200) is taken


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"origin": "http://127.0.0.1:9"},
        {"origin": ""},
    ],
)
def test_another_origin_changes_nothing(anna: TestClient, labels: Labels, headers: dict[str, str]) -> None:
    ask = anna.get("/api/next").json()
    body = {"id": str(uuid.uuid4()), "ask": ask["id"], "choice": "left"}
    for path in ("/api/label", "/api/undo"):
        assert anna.post(path, json=body, headers=headers).status_code == 403
    del anna.headers["origin"]
    assert anna.post("/api/label", json=body).status_code == 403
    assert labels.of("label", undone=True) == []


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_what_a_form_elsewhere_could_send_is_refused(anna: TestClient, labels: Labels, kind: str) -> None:
    answer = anna.post("/api/undo", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"{", 400, "this is not JSON"),
        (b"[]", 400, "this is no JSON object"),
        (b'{"seconds": NaN}', 400, "this is not JSON"),
        (b"\xff", 400, "this is not JSON"),
        (b"[" * 60_000, 400, "this is not JSON"),
        (b'{"reason": "' + b"x" * server.LARGEST_BODY + b'"}', 413, "a request may have 65536 bytes"),
    ],
)
def test_what_is_no_request_is_refused_in_a_sentence(anna: TestClient, content: bytes, status: int, says: str) -> None:
    answer = anna.post("/api/label", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (status, {"error": says})


def test_a_body_without_a_length_is_cut_off_too(anna: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    answer = anna.post("/api/label", content=parts(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_an_old_pair_is_a_conflict(anna: TestClient) -> None:
    ask = anna.get("/api/next").json()["id"]
    assert click(anna).status_code == 200
    answer = click(anna, ask=ask)
    assert answer.status_code == 409 and "not on your page any more" in answer.json()["error"]


@pytest.mark.parametrize("beta", ["0", "-1", "nan", "inf", "x", ""])
def test_a_beta_that_is_none_is_refused(anna: TestClient, beta: str) -> None:
    assert anna.get("/api/drift", params={"beta": beta}).status_code == 400


def test_people_are_for_the_owner(session: Session, labels: Labels, anna: TestClient) -> None:
    assert anna.get("/api/people").status_code == 403
    click(anna)
    found = client(session, labels, "owner's token").get("/api/people").json()
    assert [one["name"] for one in found["people"]] == ["anna"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../secret.js", "/static/..%2fsecret.js", "/static/%2e%2e/secret.js", "/static/..\\secret.js",
        "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/secret.txt", "/static/index.html", "/static/",
        "/static/arena.js%00", "/../server.py", "/server.py",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(anna: TestClient, path: str) -> None:
    assert anna.get(path).status_code == 404


def test_a_path_that_no_client_would_send_leads_nowhere(session: Session, labels: Labels) -> None:
    """Clients tidy up paths; this asks the application itself."""
    import asyncio

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [(b"host", b"127.0.0.1"), (b"cookie", f"arena-{PORT}=owner".encode())]
    labels.admit("me", "owner")
    for path in ("/static/../secret.js", "/static/..", "/static/."):
        sent.clear()
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
        asyncio.run(server.app(session, labels, "127.0.0.1", PORT)(scope, receive, send))
        assert sent[0]["status"] == 404


@pytest.mark.parametrize("path", ["/", "/api/session", "/nothing", "/static/arena.js", "/?token=wrong"])
def test_every_answer_says_what_a_browser_may_do_with_it(anna: TestClient, path: str) -> None:
    headers = anna.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert not any("unsafe" in part or "http" in part or "*" in part for part in policy.values())
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"


def test_refusals_say_it_too(session: Session, labels: Labels) -> None:
    for answer in (
        client(session, labels).get("/api/session"),
        client(session, labels).get("/", headers={"host": "evil.example"}),
        client(session, labels).post("/api/label", content=b""),
    ):
        assert answer.status_code >= 400 and "content-security-policy" in answer.headers
        assert set(answer.json()) == {"error"}


def test_markup_of_models_and_people_is_text(anna: TestClient, labels: Labels) -> None:
    state = anna.get("/api/session")
    assert state.headers["content-type"] == "application/json"
    ask = state.json()["ask"]
    for html in (ask["prompt"], ask["left"], ask["right"]):
        assert "<script" not in html and "&lt;script&gt;" in html
    assert click(anna, reason=SCRIPT).json()["saved"]
    assert labels.of("label")[0].reason == SCRIPT  # kept as it was typed, and shown by nobody as markup


def test_a_fault_is_one_sentence_and_no_traceback(anna: TestClient, session: Session, monkeypatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("inside: /secret/path")

    monkeypatch.setattr(session, "state", broken)
    answer = anna.get("/api/session")
    assert answer.status_code == 500 and json.loads(answer.text) == {"error": "the server has failed: RuntimeError"}


def test_a_click_that_cannot_be_saved_is_not_said_to_be(anna: TestClient, labels: Labels, session: Session) -> None:
    """As on a full disk."""
    anna.get("/api/next")
    labels._database.execute("PRAGMA query_only = ON")
    answer = click(anna)
    assert answer.status_code == 500 and "cannot be read or written" in answer.json()["error"]
    labels._database.execute("PRAGMA query_only = OFF")
    assert labels.of("label") == [] and click(anna).json()["saved"] is True

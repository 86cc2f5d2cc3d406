"""`serve`: what `score` says, over HTTP, to many at once, and to those alone who may ask."""

import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from processes import Started

from rlhf_pipeline import cli
from rlhf_pipeline import recipe as recipes
from rlhf_pipeline.data.encode import encode_records
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.models.tiny import world
from rlhf_pipeline.use import serve as serving
from rlhf_pipeline.use import web
from rlhf_pipeline.use.score import Scorer

PROMPT, REPLY = "Q: How does a frog sound?\nA:", " It is croak. Thank you for asking!"
TURNS = [{"role": "user", "content": "How does a frog sound?"}, {"role": "assistant", "content": "It croaks."}]
TOKEN = "open-sesame"


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


def ask(port: int, path: str, body: Any = None, **headers: str) -> Answer:
    """One request over a connection of its own; `body` is bytes, or what is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = ({"Content-Type": "application/json"} if content is not None else {}) | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    try:
        connection.request("GET" if content is None else "POST", path, content, sent)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, json.loads(answer.read()), headers)
    finally:
        connection.close()


@pytest.fixture(scope="module")
def scorer(tiny_run: Path) -> Scorer:
    return Scorer(tiny_run, recipes.of_run(tiny_run), "reward", False)


@pytest.fixture(scope="module")
def served(scorer: Scorer) -> Iterator[Callable[..., int]]:
    """A function that opens a server in a thread of this process, with a token or without; returns its port."""
    servers: dict[str | None, tuple[uvicorn.Server, threading.Thread, serving.Batches, int]] = {}

    def start(token: str | None = None) -> int:
        if token not in servers:
            listening = web.listen("127.0.0.1", 0)
            batches = serving.Batches(scorer, False, 16)
            server = web.server(serving.app(batches, "reward", "127.0.0.1", token), serving.LAST_S)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            servers[token] = server, thread, batches, listening.getsockname()[1]
        return servers[token][3]

    yield start
    for server, thread, batches, _ in servers.values():
        server.should_exit = True
        thread.join()
        batches.close()


def scores_of(scorer: Scorer, pairs: list[tuple[Any, Any]]) -> list[float]:
    """What the command `score` makes of pairs."""
    encoded = encode_records(scorer.tokenizer, scorer.spec, pairs)
    scores = scorer.scores([(prompt, reply) for prompt, reply in encoded], 16, lambda _: None)
    return [score.mean for score in scores if score]


def test_200_at_once_get_each_their_own_score(served, scorer) -> None:
    """Of 200 requests with different texts, several replies in some, none is lost and none is mixed up."""
    rng = random.Random(0)
    asked = world.questions()
    wanted = []
    for number in range(200):
        some = [asked[(7 * number + more) % len(asked)] for more in range(rng.randint(1, 2))]
        texts = [f" The answer is {word}. {number}" for word in rng.sample(sorted(world.FACTS["color"]), len(some))]
        wanted.append([(question.prompt, text) for question, text in zip(some, texts, strict=True)])
    port, gate = served(), threading.Barrier(200)

    def one(pairs: list[tuple[str, str]]) -> Answer:
        gate.wait()
        prompts, replies = zip(*pairs, strict=True)
        return ask(port, "/score", {"prompts": prompts, "replies": replies})

    with ThreadPoolExecutor(200) as threads:
        answers = list(threads.map(one, wanted))
    assert [answer.status for answer in answers] == [200] * 200
    expected = iter(scores_of(scorer, [pair for pairs in wanted for pair in pairs]))
    for pairs, answer in zip(wanted, answers, strict=True):
        assert answer.body["scores"] == pytest.approx([next(expected) for _ in pairs], abs=1e-5)
        assert "std" not in answer.body
    assert ask(port, "/health").body == {"status": "ok", "stage": "reward", "members": 1, "waiting": 0}


def test_requests_that_come_together_are_scored_together(scorer, monkeypatch) -> None:
    sizes = []
    scores = scorer.scores
    monkeypatch.setattr(scorer, "scores", lambda pairs, *rest: sizes.append(len(pairs)) or scores(pairs, *rest))
    batches = serving.Batches(scorer, False, 16)
    futures = [batches.ask([serving.Pair(PROMPT, f" It is {number}.")]) for number in range(100)]
    values = [future.result(30)[0].mean for future in futures]
    batches.close()
    assert len(sizes) <= 4
    assert values == pytest.approx(
        scores_of(scorer, [(PROMPT, f" It is {number}.") for number in range(100)]), abs=1e-5
    )


def test_conversations_and_whole_texts_are_scored_as_pairs_are(served, scorer, tokenizer) -> None:
    port = served()
    pairs = [(PROMPT, REPLY), ([TURNS[0]], "It croaks.")]
    text, turns = scores_of(scorer, pairs)
    found = ask(port, "/score", {"prompts": [PROMPT, [TURNS[0]]], "replies": [REPLY, TURNS[1]]})
    assert found.body["scores"] == pytest.approx([text, turns], abs=1e-5)
    for messages in (TURNS, [TURNS]):
        assert ask(port, "/score", {"messages": messages}).body["scores"] == pytest.approx([turns], abs=1e-5)
    template = tokenizer.apply_chat_template(TURNS, tokenize=False)
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    for whole in (PROMPT + REPLY, PROMPT + REPLY + eos, pad * 3 + PROMPT + REPLY + eos + pad * 2):
        llama_factory = ask(port, "/score", {"model": "model", "messages": [whole, template]})
        assert llama_factory.body["scores"] == pytest.approx([text, turns], abs=1e-5)
        openrlhf = ask(port, "/get_reward", {"query": [whole, template], "prompts": ["", ""], "labels": [None, None]})
        assert openrlhf.body["rewards"] == pytest.approx([text, turns], abs=1e-5)


def test_text_is_a_users_turn_where_it_was_one_in_training() -> None:
    body = {"prompts": ["Hello?"], "replies": ["Hello!"]}
    assert serving.pairs_of(body, True) == [serving.Pair([{"role": "user", "content": "Hello?"}], "Hello!")]
    assert serving.pairs_of(body, False) == [serving.Pair("Hello?", "Hello!")]


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "this is not JSON"),
        ([1], 400, "this is no JSON object"),
        ({}, 422, "`prompts` and `replies`, two lists, or `messages`"),
        ({"prompts": ["a"], "replies": []}, 422, "there are 1 prompts and 0 replies"),
        ({"prompts": [], "replies": []}, 422, "there is nothing to score"),
        ({"prompts": ["a"], "replies": [""]}, 422, "`replies` is empty"),
        ({"prompts": [3], "replies": ["b"]}, 422, "`prompts`"),
        ({"prompts": [[TURNS[1]]], "replies": ["b"]}, 422, "turn 1 of `prompts` is of assistant"),
        ({"messages": TURNS[:1]}, 422, "does not end with the assistant's reply"),
        ({"messages": "text"}, 422, "`messages` is no list"),
        ({"messages": [3]}, 422, "`messages`"),
        ({"prompts": ["a " * 5000], "replies": ["b"]}, 422, "reply 1 has "),
        ({"prompts": ["a"] * 1025, "replies": ["b"] * 1025}, 413, "a request may have 1024 replies"),
        (b'{"prompts": "' + b"a" * 2**23, 413, "a request may have 8 MiB"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(served, body: Any, status: int, sentence: str) -> None:
    found = ask(served(), "/score", body)
    assert (found.status, list(found.body)) == (status, ["error"])
    assert sentence in found.body["error"]


def test_one_bad_request_spoils_no_other(scorer) -> None:
    batches = serving.Batches(scorer, False, 16)
    good, bad = [serving.Pair(PROMPT, REPLY)], [serving.Pair("a " * 5000, REPLY)]
    futures = [batches.ask(pairs) for pairs in (good, bad, good)]
    assert futures[0].result(30) == futures[2].result(30)
    with pytest.raises(web.Refused, match="tokens with its prompt"):
        futures[1].result(30)
    batches.close()


def test_where_too_many_wait_others_are_told_to_come_again(served, scorer, monkeypatch) -> None:
    held, going = threading.Event(), threading.Event()
    scores = scorer.scores

    def slowly(*arguments: Any) -> Any:
        going.set()
        held.wait(30)
        return scores(*arguments)

    port = served()
    monkeypatch.setattr(scorer, "scores", slowly)
    monkeypatch.setattr(serving, "MOST_WAITING", 2)
    body = {"prompts": [PROMPT], "replies": [REPLY]}
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(ask, port, "/score", body)
        assert going.wait(30)
        others = [threads.submit(ask, port, "/score", body) for _ in range(2)]
        until = time.monotonic() + 30
        while ask(port, "/health").body["waiting"] < 2 and time.monotonic() < until:
            time.sleep(0.01)
        found = ask(port, "/score", body)
        held.set()
        assert [first.result().status, *(other.result().status for other in others)] == [200] * 3
    assert found.status == 503
    assert found.headers["retry-after"] == "1"


def test_a_model_that_fails_fails_one_batch(served, scorer, monkeypatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    body = {"prompts": [PROMPT], "replies": [REPLY]}
    with monkeypatch.context() as patch:
        patch.setattr(scorer, "scores", fail)
        found = ask(served(), "/score", body)
    assert (found.status, found.body["error"]) == (500, "it could not be scored: RuntimeError: out of memory")
    assert ask(served(), "/score", body).status == 200


def test_who_brings_no_token_gets_no_score(served) -> None:
    port, body = served(TOKEN), {"prompts": [PROMPT], "replies": [REPLY]}
    assert ask(port, "/score", body).status == 401
    assert ask(port, "/score", body, Authorization="Bearer open").status == 401
    assert ask(port, "/get_reward?token=open", {"query": [PROMPT]}).status == 401
    assert ask(port, "/score", body, Authorization=f"Bearer {TOKEN}").status == 200
    assert ask(port, f"/get_reward?token={TOKEN}", {"query": [PROMPT]}).status == 200  # of clients without headers
    assert ask(port, "/health").status == 200


def test_pages_of_others_in_a_browser_here_cannot_ask(served) -> None:
    port, body = served(), {"prompts": [PROMPT], "replies": [REPLY]}
    assert ask(port, "/score", body, Host="evil.example").status == 403
    assert ask(port, "/health", Host="evil.example:80").status == 403
    assert ask(port, "/score", body, Host=f"localhost:{port}").status == 200
    assert ask(port, "/score", body, Content_Type="text/plain").status == 400
    assert ask(port, "/elsewhere").status == 404
    found = ask(port, "/score")
    assert (found.status, found.body["error"]) == (405, "/score takes POST, and not GET")
    assert found.headers["allow"] == "POST"


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is taken"):
            web.listen("127.0.0.1", port)


def test_an_address_is_shown_that_others_can_open() -> None:
    assert web.reached_at("127.0.0.1") == "127.0.0.1"
    assert web.reached_at("0.0.0.0") == web.reached_at("::") not in web.EVERY_ADDRESS


def test_an_empty_token_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf-pipeline", "serve", "none", "--token", ""])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "--token: an empty token would let everybody in" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "host"), [(signal.SIGTERM, "127.0.0.1"), (signal.SIGINT, "0.0.0.0")])
def test_the_command_ends_when_all_who_have_asked_are_answered(
    tiny_run: Path, tmp_path: Path, number: signal.Signals, host: str
) -> None:
    """A request that is under way when the signal comes gets its scores, and the command ends with 0."""
    words = ["serve", str(tiny_run), "--port", "0", "--batch-size", "1", "--token", TOKEN, "--host", host]
    read_end, write_end = os.pipe()
    with (tmp_path / "said.txt").open("w") as said:
        process = Started(words, tmp_path, {}, said.fileno(), write_end)
    os.close(write_end)
    with os.fdopen(read_end) as out:
        try:
            url = out.readline().strip()
            assert url.startswith(f"http://{web.reached_at(host)}:")
            port = int(url.rpartition(":")[2].partition("/")[0])
            while True:
                try:
                    ask(port, "/health")
                    break
                except ConnectionError:
                    time.sleep(0.05)
            replies = [f" It is {word}." for word in range(60)]
            with ThreadPoolExecutor(2) as threads:
                under_way = [
                    threads.submit(ask, port, f"/score?token={TOKEN}", {"prompts": [PROMPT] * 60, "replies": replies})
                    for _ in range(2)
                ]
                until = time.monotonic() + 30
                while not ask(port, "/health").body["waiting"] and time.monotonic() < until:
                    time.sleep(0.001)
                process.send_signal(number)
                answers = [one.result() for one in under_way]
            assert [answer.status for answer in answers] == [200, 200]
            assert [len(answer.body["scores"]) for answer in answers] == [60, 60]
            assert process.wait(30) == 0
            assert (tmp_path / "said.txt").read_text().endswith("ended\n")
        finally:
            process.kill()

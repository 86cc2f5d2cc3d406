"""A judge behind an address, against real servers on this machine: a small one that fails, and `transformers serve`."""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import MODEL, Chat, Response, refuses, says, serving

from rlhf_pipeline.errors import InputError, RunError
from rlhf_pipeline.judges import address as addresses
from rlhf_pipeline.judges.address import MANY_TOKENS, Said
from rlhf_pipeline.judges.question import Question
from rlhf_pipeline.judges.remote import RemoteJudge, read
from rlhf_pipeline.recipe.schema import AIJudge

PLACE = "stages.feedback.judge"
LOG = ("logprobs", "top_logprobs")
KEY = "a-key-that-nobody-may-read"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(addresses, "FIRST_WAIT_S", 0.02)


def questions(count: int) -> list[Question]:
    return [
        Question(f"What is {i} + 1?", f"It is {i + 1}.", "No idea.", "Which reply is better?", {}) for i in range(count)
    ]


def judge(chat: Chat | str, kept: Path, **settings: Any) -> RemoteJudge:
    address = chat if isinstance(chat, str) else chat.address
    spec = {"served_model": MODEL, "timeout": 5.0, "retries": 2, **settings}
    return RemoteJudge(AIJudge(model=address, **spec), kept, PLACE)


def in_turn(*responses: Response) -> Callable[[dict[str, Any]], Response]:
    """Gives the responses one after the other, and the last one again and again."""
    left = list(responses)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "run" / "judge-answers.jsonl"


def test_each_question_gets_its_own_answer_though_they_come_in_any_order(kept):
    def answers(request):
        number = int(request["messages"][0]["content"].split("What is ")[1].split()[0])
        return says("AB"[number % 2])._replace(after_s=0.02 * (5 - number % 5))

    with serving(answers) as chat:
        asked = questions(12)
        found = judge(chat, kept, concurrency=4)(asked)
        assert [answer.first for answer in found] == [1.0, 0.0] * 6
        assert [answer.text for answer in found] == ["A", "B"] * 6
        assert chat.most_at_once == 4
        assert {request["model"] for request in chat.asked} == {MODEL}
        assert {request["temperature"] for request in chat.asked} == {0}
        assert sum("It is 1." in text for text in chat.texts()) == 1


def test_the_probability_is_that_of_the_two_letters_at_the_token_that_answers(kept):
    of_answer = {"B": math.log(0.5), " A": math.log(0.1), "A": math.log(0.1), "C": math.log(0.3)}
    with serving(in_turn(says("**B**", ("**", {"A": 0.0}), ("B", of_answer), ("**", {"A": 0.0})))) as chat:
        assert judge(chat, kept)(questions(1))[0].first == pytest.approx(0.2 / 0.7)
        assert chat.asked[0]["logprobs"] is True


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A", 1.0), (" b", None), ("B.", 0.0), ("**A**", 1.0), ("(B)", 0.0), ("A: it is right, unlike B", 1.0),
        ("The answer is B", 0.0), ("A better reply is B", None), ("neither", None), ("", None), ("AB", None),
        ("<think>A says more. B is wrong.</think>\n\nB", 0.0), ("A\nbecause it is right", 1.0),
    ],
)  # fmt: skip
def test_what_counts_as_an_answer(text, first):
    assert read(Said(text, [], False)) == first


def test_nothing_is_asked_twice_whichever_judge_asks(kept):
    with serving(in_turn(says("A"))) as chat:
        judge(chat, kept)(questions(3) + questions(3))
        assert len(chat.asked) == 3
        again = judge(chat.address.removesuffix("/v1") + "/", kept)(questions(4))
        assert len(chat.asked) == 4, "the same server, and only the last question is new"
        assert [answer.first for answer in again] == [1.0] * 4
        judge(chat, kept, served_model="judge-2")(questions(1))
        assert len(chat.asked) == 5, "another model may say something else"


def test_what_was_answered_is_kept_when_the_server_fails_in_the_middle(kept):
    fails = True

    def answers(request):
        return (
            refuses(500, "out of order") if fails and "What is 5 " in request["messages"][0]["content"] else says("B")
        )

    with serving(answers) as chat:
        with pytest.raises(RunError) as error:
            judge(chat, kept, concurrency=1, retries=1)(questions(8))
        assert error.value.message == (
            f"{PLACE}.model: {chat.address} fails (500 Internal Server Error): `out of order`, 2 times in a row"
        )
        assert error.value.hint is not None and error.value.hint.endswith("what it has answered is kept")
        assert len(chat.asked) == 5 + 2
        fails = False
        assert [answer.first for answer in judge(chat, kept)(questions(8))] == [0.0] * 8
        assert len(chat.asked) == 7 + 3


def test_a_kill_in_the_middle_of_a_line_loses_that_answer_alone(kept):
    with serving(in_turn(says("A"))) as chat:
        judge(chat, kept, concurrency=1)(questions(3))
        whole = kept.read_bytes()
        kept.write_bytes(whole[:-9])
        judge(chat, kept)(questions(3))
        assert len(chat.asked) == 4
        judge(chat, kept)(questions(3))
        assert len(chat.asked) == 4


def test_processes_that_keep_answers_in_one_file_do_not_damage_it(kept, tmp_path):
    script = tmp_path / "add.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from rlhf_pipeline.judges.question import Answer; from rlhf_pipeline.judges.remote import Kept\n"
        "kept = Kept(Path(sys.argv[1]))\n"
        "for i in range(30): kept.add(f'{sys.argv[2]}-{i}', Answer(0.5, sys.argv[2] * 2000))\n"
    )
    both = [subprocess.Popen([sys.executable, str(script), str(kept), name]) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == sorted(f"{name}-{i}" for name in "ab" for i in range(30))


def test_a_server_that_is_asked_too_often_is_given_the_time_it_asks_for(kept):
    with serving(in_turn(refuses(429, "slow down", Retry_After="0.4"), says("A"))) as chat:
        began = time.monotonic()
        assert judge(chat, kept)(questions(1))[0].first == 1.0
        assert time.monotonic() - began >= 0.4


def test_waits_get_longer_and_are_not_all_alike(kept, monkeypatch):
    waited = []
    with serving(in_turn(refuses(503, "loading"))) as chat:
        asking = judge(chat, kept, retries=5)
        monkeypatch.setattr(asking.address.giving_up, "wait", lambda seconds: waited.append(seconds))
        with pytest.raises(RunError, match=r"503 Service Unavailable\): `loading`, 6 times in a row"):
            asking(questions(1))
    assert len(chat.asked) == 6
    assert all(0.5 * 0.02 * 2**i <= wait <= 0.02 * 2**i for i, wait in enumerate(waited)) and len(waited) == 5
    assert len({wait / 2**i for i, wait in enumerate(waited)}) == 5


def said_by_check(address: Chat | str, kept: Path, **settings: Any) -> tuple[str, str | None]:
    with pytest.raises(InputError) as error:
        judge(address, kept, **settings).check()
    assert error.value.place == f"{PLACE}.model"
    return error.value.message, error.value.hint


def test_what_is_said_of_an_address_where_nobody_listens(kept):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    found = said_by_check(f"http://127.0.0.1:{port}", kept, retries=8)
    assert found == (
        f"http://127.0.0.1:{port} cannot be reached: it refuses the connection",
        "see whether the server is up, and whether host and port are right",
    )
    assert time.monotonic() - began < 1, "before training, nobody waits for it"
    with pytest.raises(RunError, match="refuses the connection, 3 times in a row"):
        judge(f"http://127.0.0.1:{port}", kept)(questions(1))
    found = said_by_check("http://no-such-host.invalid/v1", kept)
    assert found[0] == "http://no-such-host.invalid/v1 cannot be reached: there is no host `no-such-host.invalid`"
    with serving(in_turn(says("A"))) as chat:
        secure = chat.address.replace("http:", "https:")
        assert said_by_check(secure, kept)[0].startswith(f"{secure} cannot be reached over TLS: ")


ANSWERS = [
    (refuses(401, "bad key"), {}, "wants a key (401 Unauthorized): `bad key`", "set `api_key_env`"),
    (refuses(403, "no"), {"api_key_env": "OUR_JUDGE"}, "refuses the key in $OUR_JUDGE (403 Forbidden)", "right"),
    (Response("<html>Welcome</html>"), {}, "answers with text/html that is not JSON: `<html>Welcome</html>`", "`/v1`"),
    (Response({"choices": []}), {}, "answers without a choice that can be read: `{\"choices\": []}`", "`/v1`"),
    (Response({"error": {"message": "no credit"}}), {}, "answers without a choice that can be read: `no credit`", ""),
    (Response([1]), {}, "answers without a choice that can be read: `[1]`", "`/v1`"),
    (Response({"choices": [{}]})._replace(breaks_off=True), {"retries": 0}, "broke the connection off", "log"),
    (refuses(429, "later"), {}, "asked so often (429 Too Many Requests): `later`, 3 times in a row", "`concurrency`"),
    (refuses(429, "pay: insufficient_quota"), {}, "asked so often (429 Too Many Requests): `pay", "the account"),
    (refuses(429, "tomorrow", Retry_After="86400"), {}, "and asks to wait for 86400 seconds", "`concurrency`"),
    (refuses(400, "too odd"), {}, "refuses the question (400 Bad Request): `too odd`", "`served_model`"),
    (Response("", 308, {"Location": "https://x.org/v1"}), {}, "leads elsewhere (308", "https://x.org/v1"),
    (says("A")._replace(after_s=0.3), {"timeout": 0.1, "retries": 1}, "not answered within 0.1 seconds", "`timeout`"),
    (says("I cannot say"), {}, "was asked for A or B, and answers `I cannot say`", "`template`"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "settings", "message", "hint"), ANSWERS, ids=[one[2][:40] for one in ANSWERS])
def test_a_fault_is_said_in_one_sentence_without_the_key(response, settings, message, hint, kept, monkeypatch):
    monkeypatch.setenv("OUR_JUDGE", KEY)
    with serving(in_turn(response)) as chat:
        found = said_by_check(
            chat, kept, **{"api_key_env": "OUR_JUDGE"} | settings if "wants" not in message else settings
        )
    assert message in found[0] and hint in str(found[1])
    assert KEY not in str(found) and "\n" not in found[0]


def test_a_model_that_is_not_served_is_named_with_those_that_are(kept):
    with serving(in_turn(refuses(404, "model not found"))) as chat:
        found = said_by_check(chat, kept, served_model="judge-2")
        assert found == (f"{chat.address} has no model `judge-2`", "set `served_model`: there is judge-1")
        wrong = chat.address.replace("/v1", "/api")
        assert said_by_check(wrong, kept)[0].startswith(f"{wrong} has nothing under {wrong}/chat/completions (404")


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        ("https://judge.org/v1/chat/completions", "https://judge.org/v1"),
        ("https://judge.org/v1beta/openai/", "https://judge.org/v1beta/openai"),
    ],
)
def test_an_address_is_known_however_much_of_it_is_written(address, url):
    assert addresses.base_url(address) == url


def test_the_key_goes_to_the_server_and_nowhere_else(kept, monkeypatch, capfd):
    monkeypatch.setenv("OUR_JUDGE", KEY)
    with serving(in_turn(says(f"A, says {KEY}"))) as chat:
        asking = judge(chat, kept, api_key_env="OUR_JUDGE")
        asking.check()
        answer = asking(questions(1))[0]
        assert chat.keys == [f"Bearer {KEY}"] * 2
    assert answer.text == "A, says ***"
    assert KEY not in kept.read_text() + "".join(capfd.readouterr())
    monkeypatch.delenv("OUR_JUDGE")
    with pytest.raises(InputError) as error:
        judge("http://localhost", kept, api_key_env="OUR_JUDGE")
    assert str(error.value) == f"{PLACE}.api_key_env: there is no key in the environment variable `OUR_JUDGE`"
    assert error.value.hint == "export OUR_JUDGE=…"


@pytest.mark.parametrize(
    ("refused", "message", "left"),
    [
        ("logprobs", "logprobs are not supported", {"temperature", "max_tokens"}),
        ("logprobs", "what is this?", {"temperature", "max_tokens"}),
        ("max_tokens", "use 'max_completion_tokens', not 'max_tokens'", {"temperature", "max_completion_tokens", *LOG}),
        ("temperature", "temperature must be 1", {"max_tokens", *LOG}),
    ],
)  # fmt: skip
def test_a_setting_that_a_server_refuses_is_left_out_once_and_for_all(refused, message, left, kept):
    def answers(request):
        return refuses(400, message) if refused in request else says("A")

    with serving(answers) as chat:
        assert [answer.first for answer in judge(chat, kept, concurrency=1)(questions(3))] == [1.0] * 3
        assert len(chat.asked) == 4
        assert [set(request) - {"model", "messages"} for request in chat.asked[1:]] == [left] * 3


def test_a_model_that_thinks_before_it_answers_is_given_room(kept):
    def answers(request):
        if request["max_tokens"] < MANY_TOKENS:
            return says("<think>First, the reply", finish="length")
        return says("<think>First, the reply A. Then B.</think>B")

    with serving(answers) as chat:
        assert [answer.first for answer in judge(chat, kept, concurrency=1)(questions(3))] == [0.0] * 3
        assert len(chat.asked) == 4


def test_a_question_that_is_refused_has_no_answer_and_ends_nothing(kept):
    def answers(request):
        return refuses(400, "too long") if "What is 1 " in request["messages"][0]["content"] else says("A")

    with serving(answers) as chat:
        found = judge(chat, kept, concurrency=1)(questions(3))
        assert [answer.first for answer in found] == [1.0, None, 1.0]
        assert found[1].text.endswith("refuses the question (400 Bad Request): `too long`")
        with pytest.raises(RunError, match="refuses the question"):
            judge(chat, kept)(questions(2)[1:])  # of a server that has answered nothing, it is no fault of the question


def test_an_answer_that_comes_byte_by_byte_must_be_whole_in_time(kept):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        spec = {"timeout": 0.3, "retries": 0}
        asking = judge(f"http://127.0.0.1:{listening.getsockname()[1]}", kept, **spec)

        def drip():
            connection, _ = listening.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(30):
                time.sleep(0.05)
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(RunError, match=r"has not answered within 0\.3 seconds"):
            asking(questions(1))
        assert time.monotonic() - began < 1
        thread.join()

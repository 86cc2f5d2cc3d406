"""A reward model on call: scores over HTTP, computed in batches that are collected from whoever asks at the same time.

    GET  /health      {status, stage, members, waiting}
    POST /score       {prompts, replies} or {messages} -> {scores, stage}, of an ensemble also {std}
    POST /get_reward  {query} -> {rewards}: what OpenRLHF asks of a remote reward model

LLaMA-Factory's `reward_model_type: api` posts {model, messages} with whole texts, and reads {scores}: that is `/score`.

What is refused is {error: sentence}: 400 no JSON, 401 no token, 403 another host, 404, 413 too large, 422 nothing that
can be scored, 500 it could not be scored, 503 too many wait.
"""

import asyncio
import hmac
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_pipeline.data.encode import Ids, encode_records
from rlhf_pipeline.data.turns import Prompt, Reply, RowError, demonstration, reply_of, text_of, to_be_answered, turns_of
from rlhf_pipeline.errors import InputError
from rlhf_pipeline.use import web
from rlhf_pipeline.use.score import Score, Scorer
from rlhf_pipeline.use.web import LOOPBACK, Refused

LARGEST_BODY = 8 * 2**20  # bytes
MOST_REPLIES = 1024  # of one request
MOST_WAITING = 4096  # replies, of all requests
WINDOW_S = 0.005  # for so long a batch waits for more, counted from its first request
AT_ONCE = 8  # batches that are made up together, of replies of like length
LAST_S = 60  # for so long requests are still answered when it is to stop


class Pair(NamedTuple):
    """What is to be scored: a reply to a prompt; or with no reply, the whole text of both, as a template made it."""

    prompt: Prompt
    reply: Reply | None


class Batches:
    """Scores what several threads ask for, in one thread of its own, which alone touches model and tokenizer.

    Args:
        scorer: the reward model.
        chat: whether text under `prompts` is a user's turn; see `score.chat_of`.
        batch_size: how many replies go through the model at once.
    """

    def __init__(self, scorer: Scorer, chat: bool | None, batch_size: int) -> None:
        self.scorer, self.chat, self.batch_size = scorer, chat, batch_size
        self.waiting = 0
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[tuple[list[Pair], Future[list[Score]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="scores", daemon=True)
        self._thread.start()

    def ask(self, pairs: list[Pair]) -> "Future[list[Score]]":
        """Have pairs scored.

        Returns:
            Their scores once they are there, or a `Refused`.

        Raises:
            Refused: too many wait already.
        """
        with self._lock:
            if self.waiting and self.waiting + len(pairs) > MOST_WAITING:
                raise Refused(503, f"{self.waiting} replies wait to be scored already; ask again in a moment")
            self.waiting += len(pairs)
        future: Future[list[Score]] = Future()
        self._asked.put((pairs, future))
        return future

    def close(self) -> None:
        """Score what waits, and end."""
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            window: list[tuple[list[Pair], Future[list[Score]]]] = []
            until = None
            while sum(len(pairs) for pairs, _ in window) < AT_ONCE * self.batch_size:
                try:
                    found = self._asked.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
                except queue.Empty:
                    break
                if found is None:
                    ended = True
                    break
                window.append(found)
                until = until or time.monotonic() + WINDOW_S
            self._answer(window)

    def _answer(self, window: list[tuple[list[Pair], "Future[list[Score]]"]]) -> None:
        """Score all requests of a window together, each for itself in what may be wrong with it."""
        sound: list[tuple[Future[list[Score]], list[tuple[Ids, Ids]]]] = []
        for pairs, future in window:
            with self._lock:
                self.waiting -= len(pairs)
            if not future.set_running_or_notify_cancel():  # nobody waits for it any more
                continue
            try:
                sound.append((future, self._encode(pairs)))
            except (Refused, InputError, RowError) as error:
                future.set_exception(error if isinstance(error, Refused) else Refused(422, str(error)))
            except Exception as error:
                future.set_exception(_failure(error))
        try:
            every = [pair for _, tokens in sound for pair in tokens]
            scores = iter(self.scorer.scores(every, self.batch_size, lambda _: None) if every else [])
        except Exception as error:  # of the model: no memory is left, say; the next batch may be smaller
            for future, _ in sound:
                future.set_exception(_failure(error))
            return
        for future, tokens in sound:
            own = [next(scores) for _ in tokens]
            known = [score for score in own if score is not None]
            if len(known) == len(own):
                future.set_result(known)
            else:
                future.set_exception(Refused(422, f"reply {own.index(None) + 1} gives no finite number"))

    def _encode(self, pairs: Sequence[Pair]) -> list[tuple[Ids, Ids]]:
        """The tokens of each prompt and reply; of a whole text its last token, the EOS, is the reply.

        Raises:
            Refused: one does not fit into the model's context.
            InputError: the chat template refuses one.
        """
        records = [(pair.prompt, pair.reply) for pair in pairs if pair.reply is not None]
        encoded = iter(encode_records(self.scorer.tokenizer, self.scorer.spec, records))
        found = []
        for number, pair in enumerate(pairs, 1):
            prompt, reply = self._whole(str(pair.prompt)) if pair.reply is None else next(encoded)
            length, context = len(prompt) + len(reply), self.scorer.context
            if context and length > context:
                raise Refused(422, f"reply {number} has {length} tokens with its prompt, and the model takes {context}")
            found.append((prompt, reply))
        return found

    def _whole(self, text: str) -> tuple[Ids, Ids]:
        """The tokens of a prompt with its reply, whose special tokens the text has; one EOS ends it."""
        tokenizer = self.scorer.tokenizer
        eos, pad, bos = str(tokenizer.eos_token), str(tokenizer.pad_token), tokenizer.bos_token
        special = f"(?:{re.escape(eos)}|{re.escape(pad)})"
        text = re.sub(rf"(?:{special}\s*)+\Z", "", re.sub(rf"\A(?:{re.escape(pad)})+", "", text))
        ids = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add one
            ids = ids[:-1]
        return ids, [tokenizer.eos_token_id]


def _failure(error: Exception) -> Refused:
    return Refused(500, f"it could not be scored: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


# Requests


def pairs_of(body: Mapping[str, Any], chat: bool | None) -> list[Pair]:
    """What a request to `/score` wants scored.

    Args:
        body: `prompts` and `replies` of the same number; or `messages`: a conversation, or a list of them, or of whole
            texts.
        chat: whether text under `prompts` is a user's turn.

    Raises:
        Refused: it is neither.
    """
    try:
        if "messages" in body and not {"prompts", "replies"}.isdisjoint(body):
            raise Refused(422, "a request has `prompts` and `replies`, or `messages`, and not both")
        if "messages" in body:
            return _of_messages(body["messages"])
        prompts, replies = body.get("prompts"), body.get("replies")
        if not isinstance(prompts, list) or not isinstance(replies, list):
            raise Refused(422, "a request has `prompts` and `replies`, two lists, or `messages`")
        if len(prompts) != len(replies):
            raise Refused(422, f"there are {len(prompts)} prompts and {len(replies)} replies")
        return [Pair(_prompt(one, chat), reply_of({"replies": its}, "replies")) for one, its in zip(prompts, replies)]  # noqa: B905
    except RowError as error:
        raise Refused(422, str(error)) from None


def _prompt(value: Any, chat: bool | None) -> Prompt:
    if isinstance(value, list):
        return to_be_answered(turns_of({"prompts": value}, "prompts"))
    text = text_of({"prompts": value}, "prompts")
    return [{"role": "user", "content": text}] if chat else text


def _of_messages(messages: Any) -> list[Pair]:
    if not isinstance(messages, list):
        raise Refused(422, "`messages` is no list")
    if messages and all(isinstance(one, dict) for one in messages):
        messages = [messages]
    found = []
    for one in messages:
        if isinstance(one, str):
            found.append(Pair(text_of({"messages": one}, "messages"), None))
            continue
        if isinstance(one, list) and one and not (isinstance(one[-1], dict) and one[-1].get("role") == "assistant"):
            raise Refused(422, "a conversation in `messages` does not end with the assistant's reply")
        records = demonstration({"messages": one}, "messages", judged=False)
        if not records:
            raise Refused(422, "a conversation in `messages` has no reply")
        found.append(Pair(*records[0]))
    return found


def _queries(body: Mapping[str, Any]) -> list[Pair]:
    """What OpenRLHF wants scored: whole texts; `prompts` and `labels` beside them say nothing more."""
    query = body.get("query")
    texts = [query] if isinstance(query, str) else query
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise Refused(422, "`query` is no list of texts")
    return [Pair(text, None) for text in texts]


# HTTP


def app(batches: Batches, stage: str, host: str, token: str | None) -> Starlette:
    """The application.

    Args:
        batches: computes scores.
        stage: the reward stage's name.
        host: the address that it was opened for.
        token: what each request has to bring along; None for nothing.
    """
    ensemble = len(batches.scorer.members) > 1

    async def scored(pairs: list[Pair]) -> list[Score]:
        if not pairs:
            raise Refused(422, "there is nothing to score")
        if len(pairs) > MOST_REPLIES:
            raise Refused(413, f"a request may have {MOST_REPLIES} replies, and this one has {len(pairs)}")
        return await asyncio.wrap_future(batches.ask(pairs))

    async def health(request: Request) -> Response:
        _let_in(request, host, None)
        members, waiting = len(batches.scorer.members), batches.waiting
        return JSONResponse({"status": "ok", "stage": stage, "members": members, "waiting": waiting})

    async def score(request: Request) -> Response:
        body = await _body(request, host, token)
        scores = await scored(pairs_of(body, batches.chat))
        spread = {"std": [one.std for one in scores]} if ensemble else {}
        return JSONResponse({"scores": [one.mean for one in scores], **spread, "stage": stage})

    async def get_reward(request: Request) -> Response:
        body = await _body(request, host, token)
        return JSONResponse({"rewards": [one.mean for one in await scored(_queries(body))]})

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/score", score, methods=["POST"]),
            Route("/get_reward", get_reward, methods=["POST"]),
        ],
        exception_handlers=web.handlers(
            "there is nothing here: it is /score, /get_reward or /health",
            {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}},
        ),
    )


def _let_in(request: Request, host: str, token: str | None) -> None:
    """See that a request may be answered.

    A page of somebody else's in a browser on this machine can have its name lead here (DNS rebinding), so that what is
    open to this machine alone answers to no other name.

    Raises:
        Refused: it may not.
    """
    if host in LOOPBACK and web.host_name(request.headers.get("host", "")) not in LOOPBACK:
        raise Refused(403, f"this answers to {host} alone")
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip() if scheme.lower() == "bearer" else request.query_params.get("token", "")
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise Refused(401, "the token is missing or wrong: send `Authorization: Bearer TOKEN`, or ?token=TOKEN")


async def _body(request: Request, host: str, token: str | None) -> dict[str, Any]:
    """The JSON object that was sent, by somebody who may.

    Raises:
        Refused: they may not, or it is none, or too large.
    """
    _let_in(request, host, token)
    if not web.is_json(request.headers.get("content-type", "")):
        raise Refused(400, web.NOT_AS_JSON)
    return await web.json_object(request, LARGEST_BODY, f"a request may have {LARGEST_BODY // 2**20} MiB")


def serve(batches: Batches, stage: str, host: str, token: str | None, listening: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM; who has asked by then still gets an answer.

    Args:
        batches: computes scores.
        stage: the reward stage's name.
        host: the address that it was opened for.
        token: see `app`.
        listening: from `web.listen`.
    """
    handlers: dict[int, Callable[..., Any] | int | None] = {}
    if threading.current_thread() is threading.main_thread():  # the server sends itself a signal again when it is done
        handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        web.server(app(batches, stage, host, token), LAST_S).run(sockets=[listening])
    finally:
        batches.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)

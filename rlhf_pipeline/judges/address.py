"""A server that speaks OpenAI's protocol for chats, asked one question at a time. No torch.

vLLM, `transformers serve`, llama.cpp, Ollama and most vendors speak it. What they do not agree on is which settings of
a request they take, so a setting that is refused is left out from then on.
"""

import contextlib
import email.utils
import json
import math
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2

from rlhf_pipeline.errors import InputError
from rlhf_pipeline.recipe.schema import AIJudge
from rlhf_pipeline.rundir.words import one_line

FIRST_WAIT_S = 1.0  # before a question is asked again; twice as long each further time
LONGEST_WAIT_S = 60.0
LONGEST_ASKED_S = 600.0  # a server that asks to wait for longer is not waited for
FEW_TOKENS, MANY_TOKENS = 16, 4096  # of an answer: of one letter, and of one that thinks before it
LIMITS = ("max_tokens", "max_completion_tokens")  # the names of the setting: the second one of OpenAI's newer models
ALTERNATIVES = 5  # log-probabilities at each token: as many as every server gives
CONNECT_S = 10.0
QUOTED = 200  # characters of what a server said


class Fault(Exception):  # noqa: N818  it is caught and said as another one
    """A question was not answered.

    Args:
        message: what happened, in words that go on after the address.
        hint: what to do about it.
        kind: `refused` means the request itself, so that another one may be answered; `passing` may be over soon;
            `absent` means that nothing there speaks the protocol, which in the middle of a run may be over soon, too;
            `final` is none of these.
        wait_s: how long the server asks to wait, in seconds.
    """

    def __init__(self, message: str, hint: str, kind: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.message, self.hint, self.kind, self.wait_s = message, hint, kind, wait_s


class Said(NamedTuple):
    """What a server answered.

    Attributes:
        text: the answer.
        tokens: its tokens in turn, each with the log-probabilities of those that could have stood there; none where the
            server gives none.
        is_cut: whether it ended since it was given few tokens.
    """

    text: str
    tokens: list[tuple[str, dict[str, float]]]
    is_cut: bool


class Address:
    """An address, with its key and with what its server was found to take.

    It may be used by several threads at once.

    Args:
        spec: of the recipe; its `model` is an http(s) address.
        place: its key in the recipe, as `stages.feedback.judge`.

    Raises:
        InputError: there is no key in the environment.
    """

    def __init__(self, spec: AIJudge, place: str) -> None:
        self.spec, self.place = spec, place
        self.url = base_url(spec.model)
        self.key = _key(spec, place)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self.client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(spec.timeout, connect=min(CONNECT_S, spec.timeout)),
            limits=httpx2.Limits(max_connections=spec.concurrency),
        )
        self.settings: dict[str, Any] = {
            "temperature": 0, "max_tokens": FEW_TOKENS, "logprobs": True, "top_logprobs": ALTERNATIVES,
        }  # fmt: skip
        self.has_answered = False
        self.giving_up = threading.Event()  # nobody waits any more

    def ask(self, text: str, patient: bool = True) -> Said:
        """Send a text as a user's turn and return the answer.

        It is sent again, at most `retries` times, where the fault may pass: after a second, twice as long each further
        time and a part of that by chance, or as long as the server asks to wait.

        Args:
            text: the turn.
            patient: whether to wait for a server that is not there at all.

        Raises:
            Fault: it was not answered.
        """
        waits = 0
        while True:
            try:
                return self._once(text)
            except Fault as fault:
                passes = fault.kind == "passing" or (fault.kind == "absent" and patient)
                if not passes or self.giving_up.is_set():
                    raise
                if waits == self.spec.retries:
                    times = f", {waits + 1} times in a row" if waits else ""
                    raise Fault(fault.message + times, fault.hint, "final") from None
                wait_s = min(FIRST_WAIT_S * 2**waits, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
                if fault.wait_s is not None:
                    if fault.wait_s > LONGEST_ASKED_S:
                        said = f"{fault.message}, and asks to wait for {fault.wait_s:.0f} seconds"
                        raise Fault(said, fault.hint, "final") from None
                    wait_s = fault.wait_s + random.uniform(0.0, 0.1 * FIRST_WAIT_S)  # not all at the same instant
                waits += 1
                if self.giving_up.wait(wait_s):
                    raise

    def give_room(self) -> None:
        """Let answers be long from now on."""
        few = [name for name, value in self.settings.items() if name in LIMITS and value == FEW_TOKENS]
        self.settings = self.settings | dict.fromkeys(few, MANY_TOKENS)

    def models(self) -> list[str]:
        """The names of the models that the server says it serves; none where it does not say."""
        with contextlib.suppress(httpx2.HTTPError, ValueError, TypeError, KeyError, AttributeError):
            content = self.client.get(f"{self.url}/models").json()
            return [str(model["id"]) for model in content["data"]]
        return []

    def _once(self, text: str) -> Said:
        settings, refusal = self.settings, None
        while True:
            request = {"model": self.spec.served_model, "messages": [{"role": "user", "content": text}], **settings}
            status, headers, content = self._send(request)
            fewer = _fewer(settings, content) if status in (400, 422) else None
            if fewer is None:
                break
            refusal, settings = refusal or (status, headers, content), fewer
        if status == 200:
            said = self._read(headers, content, any(settings.get(name) == FEW_TOKENS for name in LIMITS))
            if refusal:
                self.settings = settings
            self.has_answered = True
            return said
        raise self._fault(*(refusal or (status, headers, content)))

    def _send(self, request: dict[str, Any]) -> tuple[int, httpx2.Headers, str]:
        """Status, headers and content of the server's response, all within the time-out.

        Raises:
            Fault: there was none.
        """
        until = time.monotonic() + self.spec.timeout
        with self._connecting(), self.client.stream("POST", f"{self.url}/chat/completions", json=request) as response:
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > until:  # the library's own time-out begins anew with every byte
                    raise httpx2.ReadTimeout("")
            content = b"".join(parts).decode("utf-8", "replace")
        return response.status_code, response.headers, content.replace(self.key, "***") if self.key else content

    @contextlib.contextmanager
    def _connecting(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TimeoutException as error:
            if isinstance(error, httpx2.ConnectTimeout):
                raise Fault("cannot be reached: no answer to the connection", _SEE_THERE, "absent") from None
            said = f"has not answered within {self.spec.timeout:g} seconds"
            raise Fault(said, "raise `timeout`, or lower `concurrency`", "passing") from None
        except httpx2.HTTPError as error:
            if _comes_of(error, ssl.SSLError):
                said = f"cannot be reached over TLS: {_short(error)}"
                raise Fault(
                    said, "see whether it is http or https, and whether its certificate holds", "final"
                ) from None
            if _comes_of(error, socket.gaierror):
                said = f"cannot be reached: there is no host `{httpx2.URL(self.url).host}`"
                raise Fault(said, "correct the address, or see whether this machine has a network", "absent") from None
            if _comes_of(error, ConnectionRefusedError):
                raise Fault("cannot be reached: it refuses the connection", _SEE_THERE, "absent") from None
            said = f"broke the connection off ({type(error).__name__}: {_short(error)})"
            raise Fault(said, "see the server's log", "passing") from None

    def _read(self, headers: httpx2.Headers, content: str, is_few: bool) -> Said:
        """The answer in a response; `is_few` where it was given few tokens.

        Raises:
            Fault: there is none.
        """
        try:
            found = json.loads(content)
        except ValueError:
            said = f"answers with {headers.get('content-type', 'something')} that is not JSON: `{_short(content)}`"
            raise Fault(said, _NOT_HERE, "absent") from None
        try:
            choice = found["choices"][0]
            text, tokens = choice["message"]["content"] or "", choice.get("logprobs") or {}
            if isinstance(text, list):  # parts, of which only texts can answer
                text = "".join(part.get("text") or "" for part in text)
            steps = [
                (str(step["token"]), {str(other["token"]): float(other["logprob"]) for other in step["top_logprobs"]})
                for step in tokens.get("content") or []
            ]
            return Said(str(text), steps, is_few and choice.get("finish_reason") == "length")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            said = f"answers without a choice that can be read: `{_short(_reason(content))}`"
            raise Fault(said, _NOT_HERE, "absent") from None

    def _fault(self, status: int, headers: httpx2.Headers, content: str) -> Fault:
        name = f"{status} {httpx2.codes.get_reason_phrase(status)}".strip()
        quoted = _short(_reason(content))
        says = f": `{quoted}`" if quoted else ""
        if status in (401, 403):
            if self.key:
                return Fault(
                    f"refuses the key in ${self.spec.api_key_env} ({name}){says}",
                    "see whether it is the right one",
                    "final",
                )
            return Fault(
                f"wants a key ({name}){says}", "set `api_key_env` to the environment variable that holds it", "final"
            )
        if status == 404:
            served = self.models()
            if served and self.spec.served_model not in served:
                there = ", ".join(served[:20])
                return Fault(
                    f"has no model `{self.spec.served_model}`", f"set `served_model`: there is {there}", "final"
                )
            return Fault(f"has nothing under {self.url}/chat/completions ({name}){says}", _NOT_HERE, "final")
        if status == 429:
            final = "insufficient_quota" in content
            hint = "see the account there" if final else "lower `concurrency`, or raise `retries`"
            return Fault(
                f"refuses to be asked so often ({name}){says}", hint, "final" if final else "passing", _wait(headers)
            )
        if status in (408, 409, 425) or status >= 500:
            return Fault(f"fails ({name}){says}", "see the server's log", "passing", _wait(headers))
        if 300 <= status < 400:
            return Fault(
                f"leads elsewhere ({name})", f"write the address that it leads to: {headers.get('location')}", "final"
            )
        return Fault(f"refuses the question ({name}){says}", "see whether `served_model` is right", "refused")


_SEE_THERE = "see whether the server is up, and whether host and port are right"
_NOT_HERE = "give the address of its OpenAI-compatible interface, which mostly ends with `/v1`"


def base_url(address: str) -> str:
    """The address under which `chat/completions` is. One without a path gets `/v1`."""
    url = httpx2.URL(address)
    path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return str(url.copy_with(path=path, fragment=None))


def _key(spec: AIJudge, place: str) -> str:
    if spec.api_key_env is None:
        return ""
    key = os.environ.get(spec.api_key_env, "").strip()
    if not key:
        raise InputError(
            f"there is no key in the environment variable `{spec.api_key_env}`",
            place=f"{place}.api_key_env",
            hint=f"export {spec.api_key_env}=…",
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"what is in the environment variable `{spec.api_key_env}` cannot be a key: it has characters that no "
            "header may have",
            place=f"{place}.api_key_env",
        )
    return key


def _fewer(settings: dict[str, Any], said: str) -> dict[str, Any] | None:
    """The settings without those that a refusal names, or if it names none, without log-probabilities.

    Returns:
        None where there is nothing to leave out.
    """
    named = [name for name in settings if name in said] or [name for name in settings if name == "logprobs"]
    if "logprobs" in named or "top_logprobs" in named:
        named = [*named, "logprobs", "top_logprobs"]
    fewer = {name: value for name, value in settings.items() if name not in named}
    if LIMITS[0] in named:
        fewer[LIMITS[1]] = settings[LIMITS[0]]
    return fewer if fewer != settings else None


def _wait(headers: httpx2.Headers) -> float | None:
    """What `Retry-After` says, in seconds from now; it is a number, or a date."""
    given = headers.get("retry-after")
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(given)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return None


def _reason(content: str) -> str:
    """What a server says in an error, which is in one of several places."""
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(key):
                found = found[key]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return content


def _comes_of(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short(said: object) -> str:
    text = one_line(str(said))
    return text if len(text) <= QUOTED else text[:QUOTED] + " …"

"""A small real server of OpenAI's protocol for chats, on this machine, that also fails as servers do."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple

MODEL = "judge-1"


class Response(NamedTuple):
    """What is sent back.

    Attributes:
        content: sent as JSON, or as it is where it is text.
        status: of HTTP.
        headers: further ones.
        after_s: how long it takes, in seconds.
        breaks_off: whether only half of the content is sent.
    """

    content: Any
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    after_s: float = 0.0
    breaks_off: bool = False


Answers = Callable[[dict[str, Any]], Response]


def says(text: str | None, *tokens: tuple[str, dict[str, float]], finish: str = "stop") -> Response:
    """A good answer; `tokens` with the log-probabilities of the likeliest ones in their place."""
    steps = [
        {"token": token, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": p} for t, p in likeliest.items()]}
        for token, likeliest in tokens
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Response(
        {"object": "chat.completion", "choices": [choice | ({"logprobs": {"content": steps}} if steps else {})]}
    )


def refuses(status: int, message: str, **headers: str) -> Response:
    """A fault as OpenAI words it; of headers `Retry_After` is `Retry-After`."""
    return Response({"error": {"message": message}}, status, {name.replace("_", "-"): v for name, v in headers.items()})


class Chat:
    """The server.

    Attributes:
        address: with `/v1`.
        answers: gets each request's content and gives the response.
        asked: the requests so far.
        keys: the header `Authorization` of each.
        most_at_once: how many requests were under way together, at most.
        models: what it says that it serves.
    """

    def __init__(self, answers: Answers) -> None:
        self.answers, self.models = answers, [MODEL]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once, self.most_at_once = 0, 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def texts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.asked]


def _handler(chat: Chat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found = self.path == "/v1/models"
            self.send(Response({"data": [{"id": name} for name in chat.models]}, 200 if found else 404))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.send(Response("<html>Not here</html>", 404))
                return
            with chat.lock:
                chat.asked.append(request)
                chat.keys.append(self.headers["Authorization"])
                chat.at_once += 1
                chat.most_at_once = max(chat.most_at_once, chat.at_once)
            try:
                response = chat.answers(request)
                time.sleep(response.after_s)
            finally:
                with chat.lock:
                    chat.at_once -= 1
            with contextlib.suppress(OSError):  # who asked may be gone
                self.send(response)

        def send(self, response: Response) -> None:
            is_text = isinstance(response.content, str)
            content = (response.content if is_text else json.dumps(response.content)).encode()
            self.send_response(response.status)
            self.send_header("Content-Type", "text/html" if is_text else "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if response.breaks_off else content)
            self.close_connection = self.close_connection or response.breaks_off

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(answers: Answers) -> Iterator[Chat]:
    """A server that is up meanwhile."""
    chat = Chat(answers)
    thread = threading.Thread(target=chat.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.http.shutdown()
        chat.http.server_close()
        thread.join()

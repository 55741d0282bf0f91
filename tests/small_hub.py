"""A server that answers as the Hugging Face hub does, and processes that ask it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:1"
BRANCHES = ("main", "next")
LARGE = (".safetensors", ".bin", ".pth")
"""Files of which the hub publishes the SHA-256."""

Repositories = Mapping[str, Mapping[str, bytes]]


class SmallHub(ThreadingHTTPServer):
    """Repositories under `owner/`, each of one commit.

    Attributes:
        repositories: name -> file -> content.
        asked: every path that was asked for, with the range of bytes if there was one.
        breaks: file -> the byte before which the connection breaks off, once.
        locked: repositories that may be listed but not read.
    """

    def __init__(self, repositories: Repositories, locked: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories = repositories
        self.locked = locked
        self.asked: list[str] = []
        self.breaks: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repositories: Repositories, locked: tuple[str, ...] = ()) -> Iterator[SmallHub]:
    """The server while it runs."""
    with SmallHub(repositories, locked) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    """The few answers that a download needs."""

    server: SmallHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append(f"{self.path} {wanted}".strip())
        repositories = self.server.repositories
        info = re.fullmatch(r"/api/models/owner/([\w-]+)/revision/(\w+)", self.path)
        file = re.fullmatch(rf"/owner/([\w-]+)/resolve/{COMMIT}/(.+)", self.path)
        if file and file[1] in self.server.locked:
            self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif file:
            self._send_file(file[2], repositories[file[1]][file[2]], body, wanted)
        elif info and info[1] == "gated":
            self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif info and info[1] in repositories and info[2] in (*BRANCHES, COMMIT):
            siblings = [{"rfilename": name} for name in repositories[info[1]]]
            name = f"owner/{info[1]}"
            answer = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(answer).encode(), body)
        elif info and info[1] in repositories:
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, name: str, data: bytes, body: bool, wanted: str) -> None:
        large = name.endswith(LARGE)
        digest = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if not wanted:
            self._send(
                200, data, body, headers, self.server.breaks.pop(name, None) if body else None
            )
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206, data[start:], body, headers)

    def _send(
        self,
        status: int,
        data: bytes,
        body: bool,
        headers: Mapping[str, str] | None = None,
        breaks: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data[:breaks])

    def log_message(self, *_: object) -> None:
        pass


def python(code: str, *arguments: object, folder: Path, **environment: object) -> str:
    """What a new process prints: huggingface_hub reads its environment once, when imported.

    The process works in `folder` and has its cache in `folder`/cache.
    """
    settings = {"HF_HUB_CACHE": folder / "cache", "HF_ENDPOINT": NOWHERE, **environment}
    settings["NO_PROXY"] = settings["no_proxy"] = "127.0.0.1"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env=environ | {name: str(value) for name, value in settings.items()},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    ).stdout


def assert_errors(found: list, expected: list[tuple[str, str]]) -> None:
    """That (type, message) pairs have these types, and messages that match."""
    for (kind, message), (expected_kind, pattern) in zip(found, expected, strict=True):
        assert kind == expected_kind, message
        assert re.search(pattern, message), message

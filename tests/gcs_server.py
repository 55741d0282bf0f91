"""A server on this machine that answers as Google Cloud Storage does."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import gcs_writes

_PATH = re.compile(r"(?:/download)?/storage/v1/b/(?P<bucket>[^/]+)(?P<o>/o(?:/(?P<name>.+))?)?")


class Asked(NamedTuple):
    """A request: for "bucket", "list", "metadata", "media" or "write"; bytes of the answer's
    media, or of what was sent to be written."""

    what: str
    name: str
    num_bytes: int


class Gcs(ThreadingHTTPServer):
    """Serves the folders in `root` as buckets; use as a context manager.

    Attributes:
        asked: every request; names are `bucket/object`.
        faults: object -> what happens to requests for its media, in turn: a status; "cut" for a
            connection that ends after half of the bytes; "whole" for all of the object instead of
            a part. When none is left, requests are answered.
        closed: buckets that nobody may read.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[Asked] = []
        self.faults: dict[str, Iterator[int | str]] = {}
        self.closed: set[str] = set()
        self.writing = threading.Lock()
        self.pieces: list[bytes] = []  # of uploads in several requests, by their number
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What clients have to be told to ask this server."""
        addresses = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        return {
            **dict.fromkeys(addresses, self.url),
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask by gRPC what bucket this is
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "CLOUDSDK_CONFIG": str(self.root),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def begin(self) -> None:
        """Forgets what it was asked."""
        self.asked.clear()

    @property
    def num_bytes(self) -> Counter[str]:
        """Object -> bytes of it that were sent."""
        sent: Counter[str] = Counter()
        for request in self.asked:
            sent[request.name] += request.num_bytes
        return sent

    def count(self, what: str, name: str = "") -> int:
        """Requests of a kind, for one object or all."""
        return sum(r.what == what and name in ("", r.name) for r in self.asked)

    def handle_error(self, *_: object) -> None:
        """Says nothing of clients that no longer want their answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Gcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        found, query = _PATH.fullmatch(url.path), dict(parse_qsl(url.query))
        if not found:
            return self._error(404, "no such method")
        bucket, name = unquote(found["bucket"]), unquote(found["name"] or "")
        file = self.server.root / bucket / name
        kind = "media" if query.get("alt") == "media" else "metadata"
        what = kind if name else "list" if found["o"] else "bucket"
        if what != "media":
            self.server.asked.append(Asked(what, f"{bucket}/{name or query.get('prefix', '')}", 0))
        if bucket in self.server.closed:
            return self._error(403, "the caller does not have access")
        if not (self.server.root / bucket).is_dir():
            return self._error(404, "The specified bucket does not exist.")
        if name and not file.is_file():
            return self._error(404, f"No such object: {bucket}/{name}")
        if what == "media":
            return self._media(f"{bucket}/{name}", file)
        if name:
            return self._json(_resource(bucket, name, file))
        if found["o"]:
            return self._json(_listing(self.server.root / bucket, query))
        return self._json({"kind": "storage#bucket", "id": bucket, "name": bucket})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, root = urlsplit(self.path).path, self.server.root
        if path == "/batch/storage/v1":
            answer = gcs_writes.delete_many(root, body)
            kind = {"Content-Type": "multipart/mixed; boundary=batch"}
            return self._send(200, kind, len(answer), answer)
        if "uploadType=resumable" in self.path:
            pieces = self.server.pieces
            if "upload_id=" not in self.path:
                pieces.append(b"")
                where = f"{self.server.url}{self.path}&upload_id={len(pieces) - 1}"
                return self._send(200, {"Location": where}, 0, b"")
            number = int(self.path.rpartition("=")[2])
            pieces[number] = body = pieces[number] + body
            if self.headers["Content-Range"].endswith("/*"):
                return self._send(308, {"Range": f"bytes=0-{len(body) - 1}"}, 0, b"")
        with self.server.writing:
            stored = gcs_writes.upload(
                root, self.path, self.headers["Content-Type"] or "", body
            ) or gcs_writes.copy(root, path)
        if stored is None:
            return self._error(404, "no such method")
        self.server.asked.append(Asked("write", f"{stored.bucket}/{stored.name}", len(body)))
        if stored.status != 200:
            return self._error(stored.status, "the object was not written")
        resource = _resource(stored.bucket, stored.name, root / stored.bucket / stored.name)
        is_rewritten = "/rewriteTo/" in path
        return self._json({"done": True, "resource": resource} if is_rewritten else resource)

    def do_DELETE(self) -> None:
        found = _PATH.fullmatch(urlsplit(self.path).path)
        if not found or not found["name"]:
            return self._error(404, "no such method")
        bucket, name = unquote(found["bucket"]), unquote(found["name"])
        status = gcs_writes.delete(self.server.root, bucket, name)
        if status != 204:
            return self._error(status, f"No such object: {bucket}/{name}")
        return self._send(204, {}, 0, b"")

    def _media(self, name: str, file: Path) -> None:
        fault = next(self.server.faults.get(name, iter(())), None)
        if isinstance(fault, int):
            self.server.asked.append(Asked("media", name, 0))
            return self._error(fault, "an error made for a test")
        size = file.stat().st_size
        headers = {"X-Goog-Generation": _generation(file), "ETag": f'"{_generation(file)}"'}
        status, first, last = 200, 0, size - 1
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and fault != "whole":
            status, first, last = 206, int(span[1]), min(int(span[2] or size - 1), size - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if first > last:
            return self._error(416, "The requested range cannot be satisfied.")
        with file.open("rb") as stream:
            stream.seek(first)
            data = stream.read(last + 1 - first)
        length = len(data)
        if fault == "cut":
            data = data[: length // 2]
            self.close_connection = True
        self.server.asked.append(Asked("media", name, len(data)))
        return self._send(status, headers, length, data)

    def _json(self, answer: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self._send(status, {"Content-Type": "application/json"}, len(data), data)

    def _error(self, status: int, message: str) -> None:
        self._json({"error": {"code": status, "message": message}}, status)

    def _send(self, status: int, headers: dict[str, str], length: int, data: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _generation(file: Path) -> str:
    return str(file.stat().st_mtime_ns // 1000)


def _resource(bucket: str, name: str, file: Path) -> dict[str, Any]:
    changed = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    time = changed.strftime("%Y-%m-%dT%H:%M:%S.") + f"{changed.microsecond // 1000:03}Z"
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{_generation(file)}",
        "name": name,
        "bucket": bucket,
        "generation": _generation(file),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "size": str(file.stat().st_size),
        "md5Hash": base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode(),
        "timeCreated": time,
        "updated": time,
    }


def _listing(bucket: Path, query: dict[str, str]) -> dict[str, Any]:
    """Objects by prefix, from one name up to another, with or without those in folders; pages."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    begin, end = query.get("startOffset", ""), query.get("endOffset")
    found: dict[str, Path | None] = {}
    for file in bucket.rglob("*"):
        name = file.relative_to(bucket).as_posix()
        if file.is_dir() or not name.startswith(prefix) or name < begin or (end and name >= end):
            continue
        head, slash, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        found[prefix + head + slash if slash else name] = None if slash else file
    first, size = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
    page = sorted(found.items())[first : first + size]
    answer: dict[str, Any] = {"kind": "storage#objects"}
    answer["prefixes"] = [name for name, file in page if file is None]
    answer["items"] = [_resource(bucket.name, name, file) for name, file in page if file]
    if first + size < len(found):
        answer["nextPageToken"] = str(first + size)
    return answer

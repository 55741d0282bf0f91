"""What a server of Google Cloud Storage does when objects are written, moved and deleted."""

import json
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

_OBJECT = r"/storage/v1/b/([^/]+)/o/([^/]+)"
_COPY = re.compile(rf"{_OBJECT}/(rewriteTo/b/([^/]+)|moveTo)/o/([^/]+)")
_UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")


class Stored(NamedTuple):
    """An object that was written: where it is, or the status that says why it was not."""

    bucket: str
    name: str
    status: int = 200


def upload(root: Path, target: str, content_type: str, body: bytes) -> Stored | None:
    """Stores an object; None if it was asked for something else.

    Args:
        root: of the buckets.
        target: path and query of the request.
        content_type, body: of the request.
    """
    url = urlsplit(target)
    found, query = _UPLOAD.fullmatch(url.path), dict(parse_qsl(url.query))
    if not found:
        return None
    name = query.get("name", "")
    if query["uploadType"] == "multipart":
        mark = content_type.partition("boundary=")[2].strip('"').encode()
        _, about, content, _ = body.split(b"--" + mark)
        name = json.loads(about.partition(b"\n\n")[2])["name"]
        body = content.partition(b"\n\n")[2].removesuffix(b"\n")
    bucket = unquote(found[1])
    return store(root, bucket, name, body, query)


def store(root: Path, bucket: str, name: str, body: bytes, query: dict[str, str]) -> Stored:
    """Writes an object as a whole or not at all."""
    file = root / bucket / name
    expected = query.get("ifGenerationMatch")
    now = str(file.stat().st_mtime_ns // 1000) if file.is_file() else "0"
    if expected is not None and expected != now:
        return Stored(bucket, name, 412)
    if name.endswith("/"):
        return Stored(bucket, name, 400)  # nobody needs marks of folders here
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root / f".{abs(hash(name))}.unfinished"
    unfinished.write_bytes(body)
    unfinished.replace(file)
    return Stored(bucket, name)


def copy(root: Path, path: str) -> Stored | None:
    """Copies or moves an object; None if it was asked for something else."""
    found = _COPY.fullmatch(path)
    if not found:
        return None
    from_bucket, from_name, what, to_bucket, to_name = (unquote(x or "") for x in found.groups())
    source, bucket = root / from_bucket / from_name, to_bucket or from_bucket
    if not source.is_file():
        return Stored(bucket, to_name, 404)
    stored = store(root, bucket, to_name, source.read_bytes(), {})
    if what == "moveTo":
        delete(root, from_bucket, from_name)
    return stored


def delete(root: Path, bucket: str, name: str) -> int:
    """Deletes an object, and the folders that only it was in, which a bucket has none of."""
    file = root / bucket / name
    if not file.is_file():
        return 404
    file.unlink()
    folder = file.parent
    while folder != root / bucket:
        try:
            folder.rmdir()
        except OSError:
            break
        folder = folder.parent
    return 204


def delete_many(root: Path, body: bytes) -> bytes:
    """Answers a batch of requests to delete, whose parts are bounded by ``--batch``."""
    parts = []
    for bucket, name in re.findall(rf"DELETE {_OBJECT.replace('[^/]+', '[^/ ?]+')}", body.decode()):
        status = delete(root, unquote(bucket), unquote(name))
        parts.append(
            f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} x\r\n\r\n"
        )
    return "".join([*parts, "--batch--"]).encode()

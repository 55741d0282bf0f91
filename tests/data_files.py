"""The same conversations as files of every kind that training reads."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter
from tiny_run import EXAMPLE

PICTURES = EXAMPLE / "demo" / "pictures"
NAMES = tuple(sorted(path.name for path in PICTURES.iterdir())[:5])
ASKED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Is 7 even or odd?", "It is odd.", ()),
    *((f"Name the digit. {i}", f"It is a {i}.", (name,)) for i, name in enumerate(NAMES)),
    ("Which one is larger?", "The second.", NAMES[:2]),
    ("Is 8 even or odd?", "It is even.", ()),
)
"""Question, answer and the names of the pictures, which come before the question."""


def _bytes(name: str) -> bytes:
    return (PICTURES / name).read_bytes()


def _data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(_bytes(name)).decode()


def _path(name: str) -> str:
    return f"pictures/{name}"


def _struct(name: str) -> Mapping[str, Any]:
    return {"bytes": _bytes(name), "path": name}


def messages(part: Callable[[str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI messages with a part made of each picture's name."""
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [*map(part, names), {"type": "text", "text": question}]
                    if names
                    else question,
                },
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer, names in ASKED
    ]


def llava(picture: Callable[[str], Any]) -> list[dict[str, Any]]:
    """ShareGPT turns; one picture alone, several in a list."""
    found = []
    for question, answer, names in ASKED:
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + question},
            {"from": "gpt", "value": answer},
        ]
        pictures = [picture(name) for name in names]
        image = {"image": pictures[0] if len(pictures) == 1 else pictures} if pictures else {}
        found.append({"id": len(found), "conversations": turns, **image})
    return found


def vqa(key: str, answers: Callable[[str], Any], picture: Callable[[str], Any]) -> list[Any]:
    """Columns of questions, answers and lists of pictures."""
    return [
        {"question": question, key: answers(answer), "images": [picture(name) for name in names]}
        for question, answer, names in ASKED
    ]


def _jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _array_record(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


def _arrow_stream(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_everywhere(folder: Path) -> dict[str, str]:
    """Writes a file of each kind; returns paths for ``data.train`` by what they hold."""
    (folder / "pictures").symlink_to(PICTURES)
    _jsonl(folder / "paths.jsonl", messages(lambda n: {"type": "image", "image": _path(n)}))
    _jsonl(
        folder / "urls.jsonl",
        messages(lambda n: {"type": "image_url", "image_url": {"url": _data_url(n)}}),
    )
    beside = messages(lambda _: {"type": "image"})
    for row, (_, _, names) in zip(beside, ASKED, strict=True):
        row["images"] = [_path(name) for name in names]
    _jsonl(folder / "beside.jsonl", beside)
    _jsonl(folder / "llava.jsonl", llava(_path))
    (folder / "llava.json").write_text(json.dumps(llava(_path), indent=1))
    _jsonl(folder / "vqa.jsonl", vqa("answer", str, _path))
    several = vqa("answers", lambda a: [{"answer": x} for x in ("Two?", a, a)], _struct)
    for number, rows in enumerate((several[:3], several[3:])):
        table = pa.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=2)
    saved = folder / "saved"
    saved.mkdir()
    for number, rows in enumerate((several[:4], several[4:])):
        _arrow_stream(saved / f"data-{number:05}-of-00002.arrow", rows)
    files = [{"filename": file.name} for file in sorted(saved.iterdir())]
    (saved / "state.json").write_text(json.dumps({"_data_files": files}))
    pictures_in_rows = llava(_struct)
    for row in pictures_in_rows:
        row["images"] = row.pop("image", None)
        if isinstance(row["images"], Mapping):
            row["images"] = [row["images"]]
    _arrow_stream(folder / "llava.arrow", pictures_in_rows)
    _array_record(folder / "data.array_record", llava(_data_url))
    in_lines = "paths.jsonl urls.jsonl beside.jsonl llava.jsonl vqa.jsonl llava.json"
    in_tables = "part-*.parquet saved llava.arrow data.array_record"
    return {name: str(folder / name) for name in (*in_lines.split(), *in_tables.split())}

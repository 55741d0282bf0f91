"""The mixed batch job beside transformers: requests with 0 to 3 pictures, 5 to 800 prompt tokens.

    python benchmarks/batch.py --search        # 200 requests, three turns, both at their best
    python benchmarks/batch.py --quick
    python benchmarks/batch.py --peer-python ENV/bin/python   # with current transformers

Both sides read the same requests and pictures from disk, in float32 with the same weights, choose
greedily, and must give the same tokens. transformers gets the requests sorted and batched; which
attention, order and batch size, and which sizes of our engine, are found on a part of the job first
(`--search`), or are the ones that won before. Then the same, one request at a time. At last our
programs are timed one by one and compared with what the machine can do.
"""

from pathlib import Path
from typing import Any

from harness import (
    Report,
    Result,
    Side,
    Spread,
    add_peer_python,
    against_limit,
    against_peer,
    arguments_of,
    gibibytes,
    in_turns,
    serve,
)
from harness import parser as harness_parser
from job import read_job, write_job
from models import CACHE, model_folder

PEER: dict[str, Any] = {"attention": "sdpa", "batch_size": 8, "sort_by": "limit"}
PEER_CHANGES: tuple[dict[str, Any], ...] = (
    {"attention": "eager"},
    {"sort_by": "length"},
    {"batch_size": 1},
    {"batch_size": 4},
    {"batch_size": 16},
)
SIZES = "max_length=1024 max_tiles=12 tile_counts=4,8,12 pictures_at_once=1"
OURS = "num_slots=8"
OURS_CHANGES = (
    "num_slots=4",
    "num_slots=16",
    "num_slots=8 decode_steps=8",
    "num_slots=8 decode_steps=32",
    "num_slots=8 prompt_lengths=32,64,128,256",
    "num_slots=8 prompt_lengths=64,128,256,512,1024",
    "num_slots=8 tile_counts=1,2,4,8,12",
)
AIMS = {"mixed": 3.0, "alone": 1.0, "bandwidth": 0.7, "matrix": 0.7}


def ours_side() -> dict[str, Any]:
    import ours

    return ours.TASKS


def peer_side() -> dict[str, Any]:
    import peer

    return peer.TASKS


def probe_side() -> dict[str, Any]:
    import probe

    return {"probe": probe.probe}


SIDES = {"ours": ours_side, "peer": peer_side, "probe": probe_side}


def num_tokens(result: Result) -> int:
    return sum(len(answer["tokens"]) for answer in result.values["answers"].values())


def rate(result: Result) -> float:
    """New tokens a second."""
    return num_tokens(result) / result.seconds


def search_peer(peer: Side, ids: list[str], found: dict[str, float]) -> dict[str, Any]:
    """The fastest settings, one changed after the other."""
    best = PEER
    peer.ask("run", ids=ids[:4], **best)
    found[str(best)] = rate(peer.ask("run", ids=ids, **best))
    for change in PEER_CHANGES:
        tried = {**best, **change}
        peer.ask("run", ids=ids[:4], **tried)
        found[str(tried)] = rate(peer.ask("run", ids=ids, **tried))
        if found[str(tried)] > found[str(best)]:
            best = tried
    return best


def search_ours(ours: Side, ids: list[str], found: dict[str, float]) -> str:
    for sizes in (OURS, *OURS_CHANGES):
        options = f"{SIZES} {sizes}"
        ours.ask("run", ids=ids, options=options)  # compiles
        found[sizes] = rate(ours.ask("run", ids=ids, options=options))
    return max(found, key=lambda sizes: found[sizes])


def differing(
    ours: Result, peer: Result, judge: Side, job: Path
) -> tuple[int, list[dict[str, Any]]]:
    """How many answers are the same, and of the others where and how close the choice was."""
    others = []
    for id, answer in ours.values["answers"].items():
        own, other = answer["tokens"], peer.values["answers"][id]["tokens"]
        if own == other and answer["text"] == peer.values["answers"][id]["text"]:
            continue
        pairs = enumerate(zip(own, other, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(own), len(other)))
        margin = judge.ask("margin", id=id, tokens=own[:same]).values
        others.append({"id": id, "token": same, **margin})
    return len(ours.values["answers"]) - len(others), others


def compare(
    report: Report,
    subject: str,
    sides: tuple[Side, Side],
    repeats: int,
    ids: list[str] | None,
    settings: tuple[dict[str, Any], dict[str, Any]],
) -> tuple[Result, Result]:
    """Adds a row; returns the last result of each."""
    runs: tuple[list[Result], list[Result]] = ([], [])
    for _ in range(repeats):
        for side, found, own in zip(sides, runs, settings, strict=True):
            found += in_turns([side], "run", 1, ids=ids, **own)[side.name]
    rates = [[rate(result) for result in found] for found in runs]
    aim = AIMS["mixed" if ids is None else "alone"]
    report.rows.append(against_peer(subject, "new tokens/s", *rates, aim=aim))
    ours, peer = runs
    report.notes.append(
        f"{subject}: {num_tokens(ours[-1])} new tokens; seconds "
        f"{Spread.of([r.seconds for r in ours])} against {Spread.of([r.seconds for r in peer])}; "
        f"peak memory {gibibytes(ours)} against {gibibytes(peer)}; "
        f"compiled in the timed runs: {sum(r.values['compiled'] for r in ours)}"
    )
    return ours[-1], peer[-1]


def profile(report: Report, ours: Side, probe: Side, repeats: int, options: str) -> None:
    """Adds rows of our programs against the machine's limits, each with a probe of its own."""
    limits: dict[str, list[float]] = {"bandwidth": [], "matrix": []}
    profiles = []
    for _ in range(repeats):
        found = probe.ask("probe").values
        for kind, rates in limits.items():
            rates.append(max(found[kind].values()) / 1e9)
        profiles.append(ours.ask("profile", options=options).values)
    rows = (
        ("encode", "matrix", "vision encoder and projector, GFLOP/s"),
        ("prefill", "matrix", "prefill, GFLOP/s"),
        ("decode", "bandwidth", "decode, GB/s"),
    )
    for part, kind, what in rows:
        subject, unit = what.split(", ")
        rates = [p["work"][part] / p["parts"][part] / 1e9 for p in profiles]
        report.rows.append(against_limit(subject, unit, rates, limits[kind], AIMS[kind]))
    last = profiles[-1]
    for part, seconds in last["parts"].items():
        report.notes.append(f"{part}: {seconds:.2f} s in {last['calls'][part]} calls")
    steps = last["calls"]["decode steps"]
    report.notes.append(
        f"decode: {1e3 * last['parts']['decode'] / steps:.2f} ms for each of {steps} steps, "
        f"{last['calls']['decoded tokens'] / steps:.2f} tokens in each"
    )
    report.details["profiles"] = profiles


def main() -> None:
    parser = harness_parser(__doc__.splitlines()[0], "batch")
    add_peer_python(parser)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--search", action="store_true", help="look for the best settings first")
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = arguments_of(parser)
    if arguments.serve:
        serve(SIDES[arguments.serve](), arguments.cores)
        return
    if arguments.quick:
        arguments.requests, arguments.repeats = 24, 1
    measure(arguments)


def measure(arguments: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = model_folder(arguments.cache)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    job = write_job(arguments.cache / "job", tokenizer, arguments.requests)
    ids = [record["custom_id"] for record in read_job(str(job))]
    some, alone = ids[:32], ids[:24]
    inputs: dict[str, Any] = {"folder": str(folder), "job": str(job), "cores": arguments.cores}
    ours = Side(__file__, "ours", **inputs)
    peer = Side(__file__, "peer", python=arguments.peer_python, **inputs)
    probe = Side(__file__, "probe", cores=arguments.cores)
    report = Report(f"Mixed batch job, {len(ids)} requests, against transformers")
    report.notes.append(f"the peer: {peer.versions()}")

    best_peer, best_ours = PEER, OURS
    if arguments.search:
        tried: dict[str, dict[str, float]] = {"ours": {}, "peer": {}}
        best_peer = search_peer(peer, some, tried["peer"])
        best_ours = search_ours(ours, some, tried["ours"])
        report.details["search, tokens/s"] = tried
        static = peer.ask("refuses_static_cache").values["error"]
        report.notes.append(f"transformers with a static cache: {static or 'works'}")
    report.notes.append(f"ours: {best_ours}; transformers: {best_peer}")
    options = f"{SIZES} {best_ours}"

    ours.ask("run", options=options)  # compiles
    peer.ask("run", ids=some[:8], **best_peer)
    settings = ({"options": options}, best_peer)
    last = compare(report, "mixed job", (ours, peer), arguments.repeats, None, settings)
    same, others = differing(*last, peer, job)
    report.notes.append(f"same answers: {same} of {len(ids)}; others: {others}")

    one = f"{SIZES} num_slots=1"
    ours.ask("run", ids=alone, options=one)
    settings = ({"options": one}, {**best_peer, "batch_size": 1})
    compare(report, "one at a time", (ours, peer), arguments.repeats, alone, settings)
    peer.close()
    profile(report, ours, probe, arguments.repeats, options)
    for side in (ours, probe):
        side.close()
    report.write(arguments.output, arguments.cores)


if __name__ == "__main__":
    main()

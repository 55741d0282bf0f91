"""The engine: requests of any length and any number of pictures in, answers out as they finish.

A fixed number of slots is kept busy. The host decides who gets a slot, as soon as it sees that one
is free; every token is chosen on the device. What an answer says is read while the device works on
what comes next.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mllama_jax.batch.admission import Admission
from mllama_jax.batch.answers import Answer, Failure, Timings
from mllama_jax.batch.device import Device
from mllama_jax.batch.feeder import Feeder
from mllama_jax.batch.options import EngineOptions
from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.prepare import prepare, sources_of
from mllama_jax.batch.programs import Chunk, Logprobs
from mllama_jax.batch.requests import Request, RequestError
from mllama_jax.batch.sequences import Job, Sequence, token_logprob
from mllama_jax.batch.stats import EngineStats
from mllama_jax.generation.config import GenerationConfig
from mllama_jax.pretrained import Params

__all__ = ["Engine", "EngineOptions", "EngineStats"]

_DOWNLOADS = 16
"""Further threads where pictures are fetched: they wait for the network, not for a processor."""


@dataclass(frozen=True)
class _Dispatch:
    """New tokens that the device is computing, of these slots."""

    owners: tuple[tuple[int, Sequence], ...]
    chunk: Chunk


@dataclass(frozen=True)
class _News:
    """Tokens that a slot has got since.

    Attributes:
        logprobs: of all slots, if this one's request asks for them.
        row: the slot's, in these.
        is_last: whether nothing more is to come.
    """

    slot: int
    sequence: Sequence
    tokens: list[int]
    logprobs: Logprobs | None
    row: int
    is_last: bool


class Engine:
    """Answers requests on the devices of a model, many at a time.

    ::

        engine = Engine(model, params, processor)
        for answer in engine.run(requests):
            print(answer.prepared.request.custom_id, answer.choices[0].text)

    A request's answer does not depend on the others: greedy text is what `model.generate` gives
    for it alone, and sampled text depends on its seed.

    Args:
        model, params: with its own mesh, if it has one.
        processor: of the same checkpoint.
        options: see `EngineOptions`.
        sources: where pictures may come from.
        date_string: today's date as the chat template is to say it; None: today's.

    Raises:
        ValueError: the model has ``hf_masked_rows``: pictures' missing tiles are not stored here.
    """

    def __init__(
        self,
        model: Any,
        params: Params,
        processor: Any,
        *,
        options: EngineOptions | None = None,
        sources: PictureSources | None = None,
        date_string: str | None = None,
    ):
        if model.hf_masked_rows:
            raise ValueError(
                "hf_masked_rows=True lets tokens attend to missing tiles, which the engine does "
                "not store: use generate"
            )
        self.options = EngineOptions() if options is None else options
        self._processor = processor
        self._sources = PictureSources() if sources is None else sources
        self._date_string = date_string
        generation = model.generation_config
        if generation is None:
            generation = GenerationConfig.from_model_config(model.text_config)
        self._end_tokens = frozenset(generation.eos_token_ids)
        self._admission = Admission(
            processor.tokenizer,
            model.text_config.vocab_size,
            self._end_tokens,
            self.options.max_length,
        )
        self._device = Device(model, params, self.options, self._end_tokens)
        self._forget_all()
        self._stopping = False
        self._done = self._failed = self._tokens_in = self._tokens_out = 0

    def _forget_all(self) -> None:
        """Nothing is being answered. The device ends what has no owner with the next decoding."""
        self._occupied: list[Sequence | None] = [None] * self.options.num_slots
        self._filling: deque[tuple[int, Sequence]] = deque()
        # Whose prompt a slot has read, if further answers to the request may copy it.
        self._read: list[Job | None] = [None] * self.options.num_slots
        self._waiting: deque[Sequence] = deque()
        self._dispatched: deque[_Dispatch] = deque()
        self._unread: deque[_News] = deque()
        self._answers: deque[Answer | Failure] = deque()

    @property
    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            done=self._done,
            failed=self._failed,
            tokens_in=self._tokens_in,
            tokens_out=self._tokens_out,
            slots_busy=sum(sequence is not None for sequence in self._occupied),
            num_slots=self.options.num_slots,
            pictures_encoded=self._device.pictures_encoded,
            pictures_reused=self._device.pictures_reused,
            programs=self._device.num_programs,
        )

    def warm_up(self) -> None:
        """Compiles, before the first request, what requests will need."""
        self._device.warm_up()

    def stop(self) -> None:
        """Takes in no more requests; those that have a slot are finished."""
        self._stopping = True

    def run(
        self, requests: Iterable[Request], *, after_step: Callable[[], None] = lambda: None
    ) -> Iterator[Answer | Failure]:
        """Answers requests, each as soon as it is complete.

        Whoever leaves the iterator before its end gives up what it has not got yet; the engine can
        run again.

        Args:
            requests: read lazily, a bounded number and size ahead of the devices.
            after_step: called after each dispatch, for those who watch `stats`.
        """
        downloads = _DOWNLOADS if self._sources.allow_remote else 0
        feeder = Feeder(
            requests,
            self._prepared,
            num_workers=self.options.num_workers + downloads,
            ahead=2 * self.options.num_slots + downloads,
            size=_num_bytes,
            room=self.options.read_ahead_bytes,
        )
        try:
            while True:
                yield from self._take_in(feeder)
                self._fill_slots()
                self._decode(is_wanted=bool(self._waiting) or not feeder.is_empty)
                # The device is at work meanwhile.
                self._hear()
                after_step()
                while self._answers:
                    yield self._answers.popleft()
                self._look()
                if not self._is_busy and (self._stopping or feeder.is_empty):
                    return
        finally:
            feeder.close()
            self._forget_all()

    @property
    def _is_busy(self) -> bool:
        return bool(
            self._unread
            or (self._waiting and not self._stopping)
            or any(sequence is not None for sequence in self._occupied)
        )

    # Requests → slots

    def _prepared(self, request: Request) -> Job | Failure:
        """In a worker thread."""
        try:
            return Job(
                prepare(
                    request,
                    self._processor,
                    self._sources,
                    max_length=self.options.max_length,
                    max_tiles=self.options.max_tiles,
                    date_string=self._date_string,
                )
            )
        except RequestError as error:
            return Failure(request.custom_id, error)
        except Exception as error:  # one request's trouble is not that of the others
            described = f"it could not be prepared: {type(error).__name__}: {error}"
            return Failure(request.custom_id, RequestError(described, status_code=500))

    def _take_in(self, feeder: Feeder[Request, Job | Failure]) -> Iterator[Failure]:
        """Gives free slots to waiting answers, as far as there are any."""
        free = [slot for slot, sequence in enumerate(self._occupied) if sequence is None]
        if self._stopping or not free:
            return
        taken: list[tuple[int, Sequence]] = []
        for slot in free:
            while not self._waiting:
                ready = feeder.take(wait=not self._is_busy and not taken)
                if ready is None:
                    break
                if isinstance(ready, Job):
                    ready = self._split(ready)
                if isinstance(ready, Failure):
                    self._failed += 1
                    yield ready
            if not self._waiting:
                break
            sequence = self._waiting.popleft()
            self._occupied[slot] = sequence
            if self._read[slot] is not sequence.job:
                self._read[slot] = None
            taken.append((slot, sequence))
        for group in _picture_groups(taken, self.options.pictures_at_once[-1]):
            self._load_pictures(group)

    def _load_pictures(self, taken: list[tuple[int, Sequence]]) -> None:
        readers = []
        for slot, sequence in taken:
            # The others get a copy of what the first of a request's answers has read.
            if not self._is_begun(sequence.job):
                readers.append((slot, sequence))
            self._filling.append((slot, sequence))
        self._device.encode([p for _, s in readers for p in s.job.prepared.pictures])
        for slot, sequence in readers:
            self._device.write_pictures(slot, sequence.job.prepared.pictures)
        for _, sequence in taken:
            sequence.job.begin(sequence.index)
        self._device.forget_pictures()

    def _is_begun(self, job: Job) -> bool:
        """Whether a slot has a request's prompt, or is getting it."""
        begun = [*self._read, *(sequence.job for _, sequence in self._filling)]
        return any(other is job for other in begun)

    def _split(self, job: Job) -> Failure | None:
        """Puts a request's answers into the queue; returns why that can't be."""
        try:
            self._waiting.extend(self._admission.sequences(job))
        except RequestError as error:
            return Failure(job.prepared.request.custom_id, error)
        return None

    # Slots → devices

    def _fill_slots(self) -> None:
        """One chunk of each prompt that is not read yet, so that long ones don't hold others up."""
        for _ in range(len(self._filling)):
            slot, sequence = self._filling.popleft()
            job, chunk = sequence.job, None
            source = next((slot for slot, read in enumerate(self._read) if read is job), None)
            if source is not None:
                chunk = self._device.copy_prompt(source, slot, sequence)
            elif not any(other.job is job and other.position for _, other in self._filling):
                start = sequence.position
                chunk = self._device.prefill(slot, sequence)
                self._tokens_in += sequence.position - start
            if chunk is None:
                self._filling.append((slot, sequence))
                continue
            if job.options.n > 1:
                self._read[slot] = job
            self._dispatched.append(_Dispatch(((slot, sequence),), chunk))

    def _decode(self, *, is_wanted: bool) -> None:
        sequences = [sequence for sequence in self._occupied if sequence is not None]
        is_guided = any(sequence.guide is not None for sequence in sequences)
        if is_guided:
            # What may come next depends on what came last, which the host has to read first.
            self._look()
            self._hear()
        masks = self._next_masks()
        owners = tuple(
            (slot, sequence)
            for slot, sequence in enumerate(self._occupied)
            if sequence is not None and sequence.is_filled
        )
        if owners:
            chunk = self._device.decode(
                dict(owners),
                masks=masks,
                one_step=is_guided,
                is_wanted=is_wanted and not self._stopping,
            )
            self._dispatched.append(_Dispatch(owners, chunk))

    def _next_masks(self) -> dict[int, np.ndarray]:
        """What guided slots may go on with; requests whose form can't be kept to fail."""
        masks = {}
        for slot, sequence in enumerate(self._occupied):
            if sequence is None or sequence.guide is None or not sequence.is_filled:
                continue
            try:
                masks[slot] = sequence.guide.mask()
            except RequestError as error:
                self._fail(sequence.job, error)
        return masks

    # Devices → answers

    def _look(self) -> None:
        """Waits for the device, and frees the slots that have come to their end."""
        while self._dispatched:
            dispatch = self._dispatched.popleft()
            wants_logprobs = any(s.job.options.logprobs is not None for _, s in dispatch.owners)
            packed, logprobs = jax.device_get(
                (dispatch.chunk.packed, dispatch.chunk.logprobs if wants_logprobs else None)
            )
            for row, (slot, sequence) in enumerate(dispatch.owners):
                if len(packed) > 1:
                    row = slot
                *tokens, count, goes_on = packed[row].tolist()
                sequence.job.first_token = sequence.job.first_token or sequence.job.seconds()
                news = _News(slot, sequence, tokens[:count], logprobs, row, not goes_on)
                self._unread.append(news)
                if news.is_last:
                    self._free(slot, sequence)

    def _hear(self) -> None:
        """Takes in the tokens that have been seen."""
        while self._unread:
            news = self._unread.popleft()
            sequence = news.sequence
            if sequence.is_done:  # by a stop string, after this was dispatched
                continue
            try:
                self._push(news)
            except RequestError as error:
                self._fail(sequence.job, error)
                continue
            sequence.is_done = sequence.is_done or news.is_last
            if sequence.is_done:
                self._finish(news.slot, sequence)

    def _push(self, news: _News) -> None:
        sequence, job = news.sequence, news.sequence.job
        for column, token in enumerate(news.tokens[: sequence.limit]):
            logprob = None
            if job.options.logprobs is not None and news.logprobs is not None:
                where = (news.row, column)
                logprob = token_logprob(token, news.logprobs, where, job.options.logprobs)
            self._tokens_out += 1
            if sequence.push(token, logprob):
                sequence.is_done = True
                return

    def _fail(self, job: Job, error: RequestError) -> None:
        """Gives up on all answers to a request."""
        for slot, sequence in enumerate(self._occupied):
            if sequence is not None and sequence.job is job:
                sequence.is_done = True
                self._occupied[slot] = None
        self._filling = deque(item for item in self._filling if item[1].job is not job)
        self._waiting = deque(sequence for sequence in self._waiting if sequence.job is not job)
        self._unread = deque(news for news in self._unread if news.sequence.job is not job)
        self._forget(job)
        self._failed += 1
        self._answers.append(Failure(job.prepared.request.custom_id, error))

    def _forget(self, job: Job) -> None:
        """Nobody copies its prompt any more."""
        self._read = [None if read is job else read for read in self._read]

    def _free(self, slot: int, sequence: Sequence) -> None:
        """Unless the slot has been given to another already."""
        if self._occupied[slot] is sequence:
            self._occupied[slot] = None

    def _finish(self, slot: int, sequence: Sequence) -> None:
        """Frees the slot; the request is answered when this was the last of its answers."""
        self._free(slot, sequence)
        job = sequence.job
        job.choices[sequence.index] = sequence.choice()
        if len(job.choices) < job.options.n:
            return
        self._forget(job)
        self._done += 1
        self._answers.append(
            Answer(
                prepared=job.prepared,
                choices=tuple(job.choices[index] for index in sorted(job.choices)),
                prompt_logprobs=job.all_prompt_logprobs(),
                timings=Timings(job.started, job.first_token, job.seconds()),
            )
        )


def _num_bytes(item: Request | Job | Failure) -> int:
    """Of pictures, about: those that a request brings along, and their tiles."""
    if isinstance(item, Failure):
        return 0
    request = item.prepared.request if isinstance(item, Job) else item
    size = sum(len(source) for source in sources_of(request) if isinstance(source, str | bytes))
    return size + (item.prepared.num_bytes if isinstance(item, Job) else 0)


def _picture_groups(
    taken: list[tuple[int, Sequence]], num_pictures: int
) -> Iterator[list[tuple[int, Sequence]]]:
    """Splits them so that each group has pictures enough for the vision encoder, and few more:
    all of a group's encoded pictures are in memory together."""
    group: list[tuple[int, Sequence]] = []
    for slot, sequence in taken:
        group.append((slot, sequence))
        if sum(len(member.job.prepared.pictures) for _, member in group) >= num_pictures:
            yield group
            group = []
    if group:
        yield group

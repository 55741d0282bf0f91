"""From a request to what the model is called with: token ids, pictures, and who sees which."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.request_json import short
from mllama_jax.batch.requests import Request, RequestError
from mllama_jax.processing.image_loading import load_image
from mllama_jax.processing.processor import MllamaProcessor
from mllama_jax.processing.prompt_images import image_spans

__all__ = ["PreparedPicture", "PreparedRequest", "prepare", "sources_of"]

_USUAL_CHARACTERS = 8
"""For each token; text with more is looked at in pieces first, see `_check_size`."""

_PIECE = 2**16


@dataclass(frozen=True)
class PreparedPicture:
    """One picture as tiles.

    Attributes:
        key: hash of the content; the same pixels have the same key, wherever they came from.
        pixel_values: (num_tiles, C, h, w) float32, as the image processor makes them, without the
            empty tiles behind.
        aspect_ratio_id: which arrangement of tiles it is.
        num_tiles: of the picture.
    """

    key: bytes
    pixel_values: np.ndarray
    aspect_ratio_id: int
    num_tiles: int


@dataclass(frozen=True)
class PreparedRequest:
    """A request in numbers.

    Attributes:
        request: as it was read.
        input_ids: (T,) int32.
        pictures: in the order of their image tokens.
        spans: the tokens that see each picture, from the first up to, without, the last.
    """

    request: Request
    input_ids: np.ndarray
    pictures: tuple[PreparedPicture, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        """Of all pictures' tiles."""
        distinct = {id(p.pixel_values): p.pixel_values for p in self.pictures}
        return sum(values.nbytes for values in distinct.values())

    def without_pixels(self) -> Self:
        """The same, but that pictures have no tiles any more: what is left of an answered one."""
        return replace(
            self,
            pictures=tuple(
                replace(p, pixel_values=np.zeros((0, *p.pixel_values.shape[1:]), np.float32))
                for p in self.pictures
            ),
        )


def prepare(
    request: Request,
    processor: MllamaProcessor,
    sources: PictureSources,
    *,
    max_length: int,
    max_tiles: int,
    date_string: str | None = None,
) -> PreparedRequest:
    """Renders and encodes the prompt, then loads its pictures. Pure; any thread may call it.

    Gives what calling the processor with the prompt and the pictures does. Special tokens that a
    chat spells are text; in the prompt of a completion they count, and image tokens are put in
    front of a prompt that has none.

    Args:
        request: what to answer.
        processor: of the checkpoint.
        sources: where pictures may come from.
        max_length: the most tokens that a request may have, prompt and answer together.
        max_tiles: the most tiles that its pictures may have together; no more are held in memory.
        date_string: today's date as the chat template is to say it; None: the real one.

    Raises:
        RequestError: the template refuses the chat; the prompt or the pictures do not fit; tokens
            that aren't in the vocabulary; image tokens and pictures that don't match; a picture
            that can't be read.
    """
    where_and_sources = list(_pictures_of(request))
    _check_tiles(request, len(where_and_sources), max_tiles)
    try:
        _check_size(request, processor, max_length)
        ids = _token_ids(request, processor, len(where_and_sources), date_string)
    except RequestError:
        raise
    except (ValueError, TypeError) as error:
        raise _error(request, str(error), _prompt_field(request)) from error
    _check_tokens(request, processor, ids, max_length)
    spans = image_spans(ids, processor.image_token_id)
    if len(spans) != len(where_and_sources):
        raise _error(
            request,
            f"the prompt has {len(spans)} image tokens ({processor.image_token}) for "
            f"{len(where_and_sources)} pictures; expected one for each",
            "messages" if request.messages else "images",
        )
    return PreparedRequest(
        request=request,
        input_ids=np.asarray(ids, np.int32),
        pictures=_pictures(request, where_and_sources, processor, sources, max_tiles),
        spans=tuple(spans),
    )


def sources_of(request: Request) -> Iterator[Any]:
    """Of a request's pictures."""
    return (source for _, source in _pictures_of(request))


def _pictures_of(request: Request) -> Iterator[tuple[str, Any]]:
    """Where each picture of a request stands, and its source."""
    for i, source in enumerate(request.images):
        yield f"images[{i}]", source
    for j, message in enumerate(request.messages or ()):
        for k, part in enumerate(_parts(message)):
            if part.get("type") == "image":
                yield f"messages[{j}].content[{k}]", part.get("image")


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a message's content; text alone is one part."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if isinstance(part, Mapping) else {} for part in content or ()]


def _check_size(request: Request, processor: MllamaProcessor, max_length: int) -> None:
    """Refuses what is far too long before it is encoded, which takes 300 bytes a character."""
    texts = [request.prompt] if isinstance(request.prompt, str) else []
    for message in request.messages or ():
        texts += [part["text"] for part in _parts(message) if isinstance(part.get("text"), str)]
    if sum(map(len, texts)) <= _USUAL_CHARACTERS * max_length:
        return
    count = 0
    for text in texts:
        for start in range(0, len(text), _PIECE):
            count += len(processor.tokenizer.encode(text[start : start + _PIECE]))
            # Cuts add some tokens, but do not double them.
            if count > 2 * max_length:
                raise _does_not_fit(request, f"more than {count}", max_length)


def _token_ids(
    request: Request, processor: MllamaProcessor, num_pictures: int, date_string: str | None
) -> list[int]:
    if request.messages is not None:
        text = processor.apply_chat_template(
            list(request.messages),
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            date_string=date_string,
        )
        return processor._encode([text], {})["input_ids"][0]
    if request.prompt is None:
        raise ValueError("there are neither messages nor a prompt")
    if isinstance(request.prompt, str):
        text = processor.tokenizer.unescape_special_tokens(request.prompt)
        if processor.image_token not in text:
            text = processor.image_token * num_pictures + text
        return processor._encode([text], {})["input_ids"][0]
    ids = list(request.prompt)
    if processor.image_token_id not in ids:
        ids = [processor.image_token_id] * num_pictures + ids
    return ids


def _check_tokens(
    request: Request, processor: MllamaProcessor, ids: list[int], max_length: int
) -> None:
    if not ids:
        raise _error(request, "the prompt has no tokens", "prompt")
    if len(ids) + 1 > max_length:
        raise _does_not_fit(request, f"{len(ids)}", max_length)
    size = len(processor.tokenizer)
    options = request.options
    named = {
        "prompt": ids,
        "stop_token_ids": options.stop_token_ids,
        "allowed_token_ids": options.allowed_token_ids or (),
        "logit_bias": options.logit_bias,
    }
    for name, tokens in named.items():
        if outside := [token for token in tokens if token >= size]:
            raise _error(request, f"{name}: {short(outside)} are not among the {size} tokens", name)
        # The model reads image tokens, but has no logit for them.
        if name != "prompt" and processor.image_token_id in tokens:
            token = f"{processor.image_token_id} ({processor.image_token})"
            raise _error(request, f"{name}: {token} is never in an answer", name)


def _pictures(
    request: Request,
    where_and_sources: Iterable[tuple[str, Any]],
    processor: MllamaProcessor,
    sources: PictureSources,
    max_tiles: int,
) -> tuple[PreparedPicture, ...]:
    """All of a request; one that it names again is not read again."""
    pictures: list[PreparedPicture] = []
    known: dict[Any, PreparedPicture] = {}
    tiles = 0
    for where, source in where_and_sources:
        name = source if isinstance(source, str) else id(source)
        if name not in known:
            known[name] = _picture(request, source, where, processor, sources)
        pictures.append(known[name])
        tiles += known[name].num_tiles
        _check_tiles(request, tiles, max_tiles)
    return tuple(pictures)


def _check_tiles(request: Request, at_least: int, max_tiles: int) -> None:
    if at_least > max_tiles:
        raise _error(
            request,
            f"the pictures have at least {at_least} tiles together, more than the {max_tiles} that "
            "a slot holds: send fewer or smaller pictures, or run with a larger max_tiles",
            "messages" if request.messages else "images",
        )


def _picture(
    request: Request, source: Any, where: str, processor: MllamaProcessor, sources: PictureSources
) -> PreparedPicture:
    if isinstance(source, str):
        try:
            data: Any = sources.read(source)
        except ValueError as error:
            raise _error(request, f"{where}: {error}", where) from error
        where = f"{where}, {short(source)}"
    else:
        data = source
    try:
        image = load_image(data, where=where)
        features = processor.image_processor([[image]], return_tensors="np")
    except (ValueError, TypeError, OSError) as error:
        raise _error(request, str(error), where.partition(",")[0]) from error
    aspect_ratio_id = int(features["aspect_ratio_ids"][0, 0])
    [[num_tiles]] = features["num_tiles"]
    # The other tiles are zeros; a view would keep their memory.
    pixel_values = features["pixel_values"][0, 0, :num_tiles].copy()
    digest = hashlib.blake2b(pixel_values, digest_size=16)
    digest.update(aspect_ratio_id.to_bytes(4, "little"))
    return PreparedPicture(digest.digest(), pixel_values, aspect_ratio_id, num_tiles)


def _does_not_fit(request: Request, tokens: str, max_length: int) -> RequestError:
    return _error(
        request,
        f"the prompt has {tokens} tokens, and there is room for {max_length - 1} before the answer "
        f"(max_length is {max_length}); shorten it, or raise max_length",
        _prompt_field(request),
    )


def _prompt_field(request: Request) -> str:
    return "prompt" if request.messages is None else "messages"


def _error(request: Request, message: str, field: str) -> RequestError:
    return RequestError(message, field=field, custom_id=request.custom_id)

"""`generate`: from prompts and pictures to answers, one batch at a time."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllama_jax.distributed import check_same_in_all_processes
from mllama_jax.generation.config import DEFAULT_MAX_LENGTH, GenerationConfig, check_options
from mllama_jax.generation.decoding import DecodeState, Rules, decode, prefill
from mllama_jax.generation.inputs import Text, check_images, check_text, host_arrays, make_prompt
from mllama_jax.generation.sampling import SamplingParams, row_keys
from mllama_jax.generation.streaming import Decoder, Listener
from mllama_jax.pretrained import Params
from mllama_jax.shapes import Array, Float, Int
from mllama_jax.sharding import place
from mllama_jax.text import GenerativeModule

__all__ = ["TOKENS_PER_LOOK", "GenerateOutput", "generate"]

TOKENS_PER_LOOK = 8
"""New tokens between two looks of the host, where it has to stream text or find stop strings."""


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        sequences: (B, T + new) int32: the prompts as they were given, padding included, then the
            new tokens, then ``pad_token_id`` in rows that ended earlier than the longest.
        finish_reason: for each row "stop" (an end token or a stop string) or "length".
        num_new_tokens: (B,) int32, new tokens of each row, end token included.
    """

    sequences: np.ndarray
    finish_reason: tuple[str, ...]
    num_new_tokens: np.ndarray

    @property
    def new_tokens(self) -> np.ndarray:
        """(B, new) int32, ``sequences`` without the prompts."""
        return self.sequences[:, self.sequences.shape[1] - self.num_new_tokens.max() :]


def generate(
    model: GenerativeModule,
    params: Params,
    input_ids: Int[Array, "B T"],
    attention_mask: Int[Array, "B T"] | None = None,
    pixel_values: Float[Array, "B M L C height width"] | None = None,
    aspect_ratio_ids: Int[Array, "B M"] | None = None,
    aspect_ratio_mask: Int[Array, "B M L"] | None = None,
    cross_attention_mask: Int[Array, "B T M L"] | None = None,
    cross_attention_states: Float[Array, "B V D"] | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    seed: int | Sequence[int] | np.ndarray = 0,
    tokenizer: Decoder | None = None,
    streamer: Callable[[int, str], None] | None = None,
    **options: Any,
) -> GenerateOutput:
    """Continues a batch of prompts, each until an end token, a stop string or the length limit.

    ::

        output = model.generate(params, **processor(images, text), max_new_tokens=25)
        print(processor.decode(output.sequences[0], skip_special_tokens=True))

    The arrays are what the processor returns, of numpy or JAX. A row's answer is the same alone and
    in any batch, whatever side it is padded on. Programs are compiled for a bounded set of prompt
    lengths, cache sizes and image counts (see `decoding`), and for each batch size.

    On a mesh (``model.mesh``) rows are split over data and fsdp, as far as their number allows, and
    heads over tensor. In a job of several processes each calls this with the same inputs and gets
    the same, whole answer.

    Args:
        model: `MllamaForConditionalGeneration`, or `MllamaForCausalLM` (which takes no pixels).
        params: the model's parameters.
        input_ids: (B, T) prompts, padded on the left or on the right.
        attention_mask: (B, T), 1 for tokens, 0 for padding; None if there is no padding.
        pixel_values, aspect_ratio_ids, aspect_ratio_mask: see `MllamaVisionModel.__call__`; None
            if no row has a picture.
        cross_attention_mask: (B, T, M, L), 1 where a token may attend to a tile; None for all. New
            tokens see what the last token of their prompt sees.
        cross_attention_states: (B, V, D) image features instead of pixels.
        generation_config: limits, stopping and sampling; the model's own if None: that of the
            checkpoint's ``generation_config.json``, else `GenerationConfig.from_model_config`.
        seed: of sampling. With one for the batch, rows draw differently from each other. With one
            for each row, a row's draws depend on its own seed alone.
        tokenizer: makes text of tokens, for stop strings and streaming; a processor will do.
        streamer: called with (row, text) for each new piece of text, special tokens left out.
        **options: fields of `GenerationConfig` to change in this call, such as ``max_new_tokens``.

    Raises:
        TypeError: there is no option of that name.
        ValueError: inputs or options are unusable or disagree, or differ between processes.
    """
    config = _settings(model, generation_config, options)
    # Where padding looks like an end token, nothing can be said about a prompt without a mask.
    padding = None if config.pad_token_id in config.eos_token_ids else config.pad_token_id
    text = check_text(model.text_config, input_ids, attention_mask, padding)
    images = check_images(
        model,
        text,
        pixel_values=pixel_values,
        aspect_ratio_ids=aspect_ratio_ids,
        aspect_ratio_mask=aspect_ratio_mask,
        cross_attention_mask=cross_attention_mask,
        cross_attention_states=cross_attention_states,
    )
    batch_size, prompt_length = text.input_ids.shape
    max_new_tokens = _max_new_tokens(config, options, prompt_length, model)
    check_same_in_all_processes(
        "the inputs and options of generate",
        [text.input_ids, text.mask, *host_arrays(images), config, np.asarray(seed)],
        model.mesh,
    )
    rules = _rules(config, model.text_config.vocab_size, row_keys(seed, batch_size), model.mesh)
    listener = None
    if streamer is not None or config.all_stop_strings:
        listener = _listener(tokenizer, config, text, streamer)

    # The generation configuration is none of the compiled programs' business.
    model = model.clone(generation_config=None)
    state = prefill(model, params, make_prompt(model, params, text, images, max_new_tokens), rules)
    answers = _decode_all(model, params, state, rules, max_new_tokens, listener)
    return dataclasses.replace(
        answers, sequences=np.concatenate([text.input_ids, answers.sequences], axis=1)
    )


def _decode_all(
    model: GenerativeModule,
    params: Params,
    state: DecodeState,
    rules: Rules,
    max_new_tokens: int,
    listener: Listener | None,
) -> GenerateOutput:
    """Decodes to the end; ``sequences`` of the result holds the new tokens alone."""
    stopped = np.zeros(len(state.ended), bool)
    stride = max_new_tokens if listener is None else TOKENS_PER_LOOK
    while True:
        if listener is not None:
            stopped = listener.hear(np.asarray(state.tokens), np.asarray(state.lengths))
        step = int(state.step)
        if step >= max_new_tokens or (stopped | np.asarray(state.ended)).all():
            break
        limit = np.asarray(min(step + stride, max_new_tokens), np.int32)
        stopped_and_limit = (place(x, model.mesh) for x in (stopped, limit))
        state = decode(model, params, state, rules, *stopped_and_limit)
    lengths = np.asarray(state.lengths)
    if listener is not None:
        listener.close()
        lengths = np.minimum(lengths, listener.lengths)
    ended = np.asarray(state.ended) | stopped
    tokens = np.asarray(state.tokens)[:, : lengths.max()]
    own = np.arange(tokens.shape[1]) < lengths[:, None]
    return GenerateOutput(
        sequences=np.where(own, tokens, np.asarray(rules.pad_token_id)).astype(np.int32),
        finish_reason=tuple("stop" if end else "length" for end in ended),
        num_new_tokens=lengths.astype(np.int32),
    )


def _settings(
    model: GenerativeModule, config: GenerationConfig | None, options: dict[str, Any]
) -> GenerationConfig:
    """The generation configuration of a call."""
    check_options(options, inspect.signature(generate).parameters)
    if config is None:
        config = model.generation_config
    if config is None:
        config = GenerationConfig.from_model_config(model.text_config)
    # What a call asks for outdoes what the file says.
    if options.get("max_length") is not None and "max_new_tokens" not in options:
        config = config.replace(max_new_tokens=None)
    config = config.replace(**options)
    if config.unsupported():
        asked = ", ".join(f"{name}={value!r}" for name, value in config.unsupported().items())
        raise ValueError(
            f"the generation configuration asks for {asked}, which generate does not do: remove it "
            "from generation_config.json or give generation_config="
        )
    return config


def _max_new_tokens(
    config: GenerationConfig, options: dict[str, Any], prompt_length: int, model: GenerativeModule
) -> int:
    """The limit of new tokens.

    Source: transformers 4.54.1, generation/utils.py: _prepare_generated_length.
    """
    if config.max_new_tokens is not None:
        limit = config.max_new_tokens
    else:
        max_length = config.max_length
        if max_length is None or (max_length == DEFAULT_MAX_LENGTH and "max_length" not in options):
            room = model.text_config.max_position_embeddings
            max_length = min(prompt_length + DEFAULT_MAX_LENGTH, room)
        limit = max_length - prompt_length
        if limit < 1:
            raise ValueError(
                f"the prompt has {prompt_length} columns, max_length={max_length} leaves no room "
                "for new tokens: shorten the prompt, raise max_length or give max_new_tokens"
            )
    if config.min_new_tokens is not None and config.min_new_tokens > limit:
        raise ValueError(
            f"min_new_tokens={config.min_new_tokens} is more than the {limit} new tokens that "
            "max_new_tokens or max_length allow"
        )
    return limit


def _listener(
    tokenizer: Decoder | None,
    config: GenerationConfig,
    text: Text,
    streamer: Callable[[int, str], None] | None,
) -> Listener:
    if tokenizer is None:
        wanted = "stop_strings" if streamer is None else "streamer"
        raise ValueError(f"{wanted} needs tokenizer=, the processor or its tokenizer")
    prompts = [ids[mask] for ids, mask in zip(text.input_ids, text.mask, strict=True)]
    return Listener(tokenizer, config.all_stop_strings, prompts, streamer)


def _rules(config: GenerationConfig, vocab_size: int, keys: Array, mesh: Mesh | None) -> Rules:
    outside = [token for token in config.eos_token_ids if token >= vocab_size]
    if outside:
        raise ValueError(
            f"eos_token_id={config.eos_token_id}: {outside[0]} is not in the vocabulary of "
            f"{vocab_size} tokens, so it can't end an answer"
        )
    is_end = np.zeros(vocab_size, bool)
    is_end[list(config.eos_token_ids)] = True
    pad = config.pad_token_id
    if pad is None:
        pad = config.eos_token_ids[0] if config.eos_token_ids else 0
    sampling = SamplingParams.same(len(keys))
    if config.do_sample:
        sampling = SamplingParams.same(
            len(keys),
            temperature=1.0 if config.temperature is None else float(config.temperature),
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else float(config.top_p),
            min_p=float(config.min_p or 0),
        )
    return Rules(
        sampling=jax.tree.map(lambda values: place(values, mesh), sampling),
        keys=jax.random.wrap_key_data(place(jax.random.key_data(keys), mesh)),
        is_end=place(is_end, mesh),
        min_new_tokens=place(np.asarray(config.min_new_tokens or 0, np.int32), mesh),
        pad_token_id=place(np.asarray(pad, np.int32), mesh),
    )

"""Text and images together: what a model is called with."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from etils import epath

from mllama_jax.hub import local_folder
from mllama_jax.processing.batch_feature import BatchFeature
from mllama_jax.processing.chat_template import (
    choose_template,
    cut_behind_last_text,
    render_template,
    templates_by_name,
    write_chat_templates,
)
from mllama_jax.processing.conversations import (
    Message,
    as_conversations,
    pictures_of,
    plain_data,
    plain_messages,
)
from mllama_jax.processing.image_processor import CONFIG_NAME, MllamaImageProcessor
from mllama_jax.processing.padding import as_arrays
from mllama_jax.processing.processor_options import (
    argument_names,
    check_names,
    sort_options,
    split_options,
)
from mllama_jax.processing.prompt_images import cross_attention_mask, deal_images, image_spans
from mllama_jax.processing.tokenizer import MllamaTokenizer, check_texts
from mllama_jax.processing.tokenizer_files import TOKENIZER_FILES, write_json

_CONFIG_NAME = "processor_config.json"


class MllamaProcessor:
    """Turns text and images into a model's arguments: a tokenizer and an image processor in one.

    Args:
        image_processor: what turns images into tiles.
        tokenizer: what turns text into ids. It must know an image token.
        chat_template: a Jinja template, or several by name; None: the tokenizer's.

    Differences from transformers, all on purpose:
        - Samples with and without images go together; a flat list of images is dealt out to the
          texts by their image tokens; images that no text speaks of are an error.
        - No second BOS, whatever the tokenizer's own template adds.
        - Special tokens that a conversation spells in its text stay text.
        - An option that nothing knows is an error, and so is one that is given twice.
        - The mask has as many tile slots as the pixel values, whatever `max_image_tiles` a call
          asks for, and `padding_side` is obeyed.

    Source: transformers 4.54.1, processing_mllama.py: MllamaProcessor.

    Raises:
        ValueError: the tokenizer has no image token.
    """

    attributes: ClassVar[tuple[str, ...]] = ("image_processor", "tokenizer")

    def __init__(
        self,
        image_processor: MllamaImageProcessor,
        tokenizer: MllamaTokenizer,
        chat_template: str | Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    ):
        image_token, image_token_id = tokenizer.image_token, tokenizer.image_token_id
        if image_token is None or image_token_id is None:
            raise ValueError(
                "The tokenizer has no image token: expected '<|image|>' in its vocabulary, or an "
                "image_token in its extra_special_tokens. It belongs to a model for text alone."
            )
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token: str = image_token
        self.image_token_id: int = image_token_id
        own = templates_by_name(chat_template)
        self.chat_template = tokenizer.chat_template if own is None else own

    @property
    def bos_token(self) -> str | None:
        return self.tokenizer.bos_token

    @property
    def model_input_names(self) -> list[str]:
        """The fields of a call's result."""
        from_images = [
            name for name in self.image_processor.model_input_names if name != "num_tiles"
        ]
        return [*self.tokenizer.model_input_names, *from_images, "cross_attention_mask"]

    # Files

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, revision: str | None = None, **overrides: Any
    ) -> "MllamaProcessor":
        """Reads a processor from a Hugging Face folder or a hub id (`owner/name`).

        Args:
            path: the folder with tokenizer.json, tokenizer_config.json, preprocessor_config.json
                and a chat template (chat_template.jinja, chat_template.json, or a field of
                tokenizer_config.json).
            revision: branch, tag or commit of a hub id.
            overrides: constructor arguments of the image processor or of the tokenizer that
                replace what the files say, such as `size`, `padding_side`, `pad_token` or
                `chat_template`.

        Raises:
            FileNotFoundError: no such folder, or a file is missing.
            ValueError: a file can't be read as what it should be.
            TypeError: an override that neither knows.
        """
        files = (CONFIG_NAME, _CONFIG_NAME, *TOKENIZER_FILES)
        image_names = {item.name for item in dataclasses.fields(MllamaImageProcessor)}
        text_names = {*argument_names(MllamaTokenizer, without=("backend", "config"))}
        text_names |= {f"{name}_token" for name in ("bos", "eos", "unk", "pad")}
        check_names(overrides, (*image_names, *text_names), "from_pretrained()")
        of_images = {name: value for name, value in overrides.items() if name in image_names}
        of_text = {name: value for name, value in overrides.items() if name in text_names}
        folder = local_folder(path, allow_patterns=files, revision=revision)
        return cls(
            MllamaImageProcessor.from_pretrained(folder, **of_images),
            MllamaTokenizer.from_pretrained(folder, **of_text),
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a folder that `from_pretrained`, here and in transformers, reads back."""
        target = epath.Path(folder).expanduser()
        self.image_processor.save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        write_chat_templates(target, self.chat_template)
        write_json(target / _CONFIG_NAME, {"processor_class": type(self).__name__})

    # Calling

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        images_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Prepares a batch of prompts, images, or prompts with images.

        Special tokens in `text` are parsed, so it must be trusted: pass what others wrote through
        `apply_chat_template` or `tokenizer.escape_special_tokens`. A prompt without BOS gets one,
        behind the images that it begins with.

        Args:
            images: one image; a list of images, dealt out to the texts in order by their image
                tokens; or a list of lists, one for each text, that may be empty.
                `mllama_jax.processing.image_loading.load_picture` says what an image may be.
            text: one prompt or a list of prompts, with an image token for each image.
            images_kwargs: options of `MllamaImageProcessor.preprocess`.
            text_kwargs: options of `MllamaTokenizer.__call__`. Truncation never cuts off images:
                it raises instead.
            common_kwargs: `return_tensors` (None: lists of ids, all else numpy arrays; "np";
                "jax") and `allow_special_tokens` (True: special tokens that were escaped in the
                text are parsed after all).
            options: any of these options, flat.

        Returns:
            Integers are int64 in numpy and int32 in JAX. Without images anywhere there are the
            text's fields alone, without text the images'.

            - input_ids, attention_mask (B, T);
            - pixel_values float32 (B, M, L, C, h, w), aspect_ratio_ids (B, M), aspect_ratio_mask
              (B, M, L): see `MllamaImageProcessor.preprocess`;
            - cross_attention_mask (B, T, M, L): 1 where a token attends to a tile. Tokens from an
              image token to the next image attend to that image, tokens before any image to none;
              what stands behind the last image attends to it, padding on the right too.

        Raises:
            TypeError: an unknown option, or one given twice; text that is none.
            ValueError: neither text nor images; image tokens and images that don't match;
                truncation would cut off an image; a batch of different lengths without padding
                that shall become arrays; what the tokenizer and the image processor raise. Errors
                name the sample, counted from 0.
        """
        groups = {
            "images_kwargs": images_kwargs,
            "text_kwargs": text_kwargs,
            "common_kwargs": common_kwargs,
        }
        of_images, of_text, common = sort_options(groups, options)
        if text is None and images is None:
            raise ValueError("There is neither text nor images; pass at least one of them.")
        tensors = common.get("return_tensors")
        if text is None:
            features = self.image_processor(images, **of_images, return_tensors=tensors)
            del features["num_tiles"]
            return features
        texts = check_texts(text)
        if not texts:
            raise ValueError("text is an empty list; expected at least one prompt.")
        if common.get("allow_special_tokens"):
            texts = [self.tokenizer.unescape_special_tokens(text) for text in texts]
        samples = deal_images(images, texts, self.image_token)
        encoding = self._encode(texts, of_text)
        if not any(samples):
            return as_arrays(encoding, tensors)
        features = self.image_processor(samples, **of_images, return_tensors=tensors)
        num_tiles = features.pop("num_tiles")
        rows = encoding["input_ids"]
        num_samples, num_images, num_slots = features["aspect_ratio_mask"].shape
        mask = cross_attention_mask(
            [image_spans(row, self.image_token_id) for row in rows],
            num_tiles,
            (num_samples, max(map(len, rows)), num_images, num_slots),
        )
        if tensors == "jax":
            features["cross_attention_mask"] = jnp.asarray(mask, jnp.int32)
        else:
            features["cross_attention_mask"] = mask
        return BatchFeature({**as_arrays(encoding, tensors), **features})

    def _encode(self, texts: Sequence[str], options: Mapping[str, Any]) -> BatchFeature:
        """The ids and masks of texts, as lists; BOS once, and every image token there."""
        prompts = [self._with_bos(text) for text in texts]
        add_special_tokens = options.get("add_special_tokens", True) and self._adds_beside_bos()
        encoding = self.tokenizer(
            prompts, **{**options, "add_special_tokens": add_special_tokens, "return_tensors": None}
        )
        for i, (text, row) in enumerate(zip(texts, encoding["input_ids"], strict=True)):
            wanted, found = text.count(self.image_token), row.count(self.image_token_id)
            if wanted != found:
                raise ValueError(
                    f"sample {i}: its text has {wanted} {self.image_token}, its ids have {found} "
                    f"({len(row)} tokens): truncation cut off images, or split_special_tokens "
                    "took them for text. Raise max_length, or drop the images from text and images."
                )
        return encoding

    def _with_bos(self, text: str) -> str:
        """`text` with BOS, behind the images that it begins with if it has none.

        Source: transformers 4.54.1, processing_mllama.py: build_string_from_input.
        """
        bos = self.bos_token
        if bos is None or bos in text:
            return text
        rest = text
        while rest.startswith(self.image_token):
            rest = rest[len(self.image_token) :]
        return text[: len(text) - len(rest)] + bos + rest

    def _adds_beside_bos(self) -> bool:
        """Whether to let the tokenizer's own template add special tokens: not if that is BOS.

        Raises:
            ValueError: it adds BOS and more, and there is no way to have only the rest.
        """
        added = self.tokenizer.encode("", add_special_tokens=True)
        if self.tokenizer.bos_token_id not in added:
            return True
        if len(added) > 1:
            raise ValueError(
                f"This tokenizer adds {self.tokenizer.convert_ids_to_tokens(added)} by itself, and "
                "BOS must not come twice. Pass add_special_tokens=False, and write the others "
                "into the text."
            )
        return False

    # Conversations

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        date_string: str | None = None,
        allow_special_tokens: bool = False,
        **options: Any,
    ) -> Any:
        """The prompt that the checkpoint's chat template makes of a conversation.

        Special tokens spelled in the conversation are escaped (see `special_tokens`), so they are
        encoded as text, here and if the prompt is passed to the processor. Images are real image
        tokens.

        Args:
            conversation: messages, `{"role": …, "content": …}`, where content is text or a list
                of parts, `{"type": "text", "text": …}` and `{"type": "image"}`; or a list of
                conversations. With `tokenize`, image parts hold a picture under one of "image"
                (Pillow image, array, path, bytes), "path", "url" (file: or data:) or "base64".
            chat_template: the name of one of the checkpoint's templates, or a template's text.
            add_generation_prompt: end with the header of the assistant's answer.
            continue_final_message: end with the text of the last message, left open.
            tokenize: return the ids, not the prompt.
            return_dict: with `tokenize`, return everything that calling the processor does, images
                included, not the ids alone.
            tools: what the assistant may call, as JSON schemas.
            documents: what the assistant may refer to.
            date_string: today's date for the template, "26 Jul 2024"; None: the template's choice,
                mostly the real one.
            allow_special_tokens: parse the special tokens that the conversation spells.
            options: with `tokenize`, those of calling the processor; all others become variables
                of the template.

        Returns:
            The prompt; with `tokenize` the ids (B, T), or a `BatchFeature` with `return_dict`. A
            batch of conversations gives a list of prompts.

        Raises:
            TypeError, ValueError: a conversation that is none; the template is missing, broken or
                refuses the conversation; see also `__call__`.
        """
        conversations, batched = as_conversations(conversation)
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt begins an answer, continue_final_message goes on with one; "
                "choose one of them."
            )
        call_options, variables = split_options(options, tokenize=tokenize)
        if return_dict and not tokenize:
            raise ValueError("return_dict=True needs tokenize=True; a prompt is only text.")
        template = choose_template(self.chat_template, chat_template, tools=bool(tools))
        escape = None if allow_special_tokens else self.tokenizer.escape
        variables = {
            **self.tokenizer.special_tokens_map,
            "add_generation_prompt": add_generation_prompt,
            **plain_data({"tools": tools, "documents": documents, **variables}, escape),
        }
        prompts = []
        for messages in conversations:
            plain = plain_messages(messages, escape)
            prompt = render_template(
                template, self.tokenizer.escape, {**variables, "messages": plain}, date_string
            )
            if continue_final_message:
                prompt = cut_behind_last_text(prompt, plain)
            prompts.append(prompt)
        if not tokenize:
            return prompts if batched else prompts[0]
        pictures = [pictures_of(messages, i) for i, messages in enumerate(conversations)]
        features = self(images=pictures, text=prompts, **call_options)
        return features if return_dict else features["input_ids"]

    # Decoding

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        """The text of one sequence of ids; see `MllamaTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens, **options)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The texts of several sequences of ids; see `MllamaTokenizer.decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, **options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        """The texts of what `generate` returned, (B, T) or (T,), without special tokens."""
        rows = generated_outputs
        if getattr(rows, "ndim", 2) == 1:
            rows = [rows]
        return self.batch_decode(rows, skip_special_tokens, **options)

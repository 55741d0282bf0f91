"""Operations that a training step's formula asks for: forward, and backward as far as is trained.

Per token, picture and so on they are those of `mllama_jax.flops`. A product of weights costs
as much again for the gradient of its input, if anything before it is trained, and once more for
that of the weights, if these are. Attention costs as much again for the gradients of its queries,
and once more for those of keys and values. The head counts for the tokens that have a label.
Nothing is counted of what rematerialisation computes again, of padding, or of norms, activations,
loss and optimizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mllama_jax.configs import MllamaConfig
from mllama_jax.flops import decoder_flops, encoded_length, image_length, vision_flops
from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.train.components import component_of
from mllama_jax.train.lora import adapters_of
from mllama_jax.train.settings import Recipe


@dataclass(frozen=True)
class Counts:
    """What of a batch is no padding.

    Attributes:
        tokens: of text.
        pairs: of tokens, the later of which attends to the earlier or is it.
        labels: tokens that are to predict the next one.
        seeing: tokens that see a picture.
        images: pictures.
        image_tokens: patches, with one class token a tile, of the tiles that the pictures have.
        seen: pairs of a token and an image token that it attends to.
    """

    tokens: int = 0
    pairs: int = 0
    labels: int = 0
    seeing: int = 0
    images: int = 0
    image_tokens: int = 0
    seen: int = 0


def counts(arrays: Mapping[str, np.ndarray], config: MllamaConfig) -> Counts:
    """Of the rows of a batch, as `mllama_jax.train.data.batches.HostBatch` holds them."""
    segments = arrays.get("segment_ids", arrays.get("attention_mask"))
    assert segments is not None
    lengths = [np.unique(row[row > 0], return_counts=True)[1].astype(np.int64) for row in segments]
    of_texts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    tokens, pairs = int(of_texts.sum()), int((of_texts * (of_texts + 1) // 2).sum())
    is_learned = arrays["labels"][:, 1:] != IGNORED_LABEL
    if "segment_ids" in arrays:  # no token predicts the first one of another text
        is_learned &= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    learned = int(is_learned.sum())
    if "pixel_values" not in arrays:
        return Counts(tokens, pairs, learned)
    is_picture = arrays["aspect_ratio_ids"] > 0
    patches = config.vision_config.num_patches
    tiles_seen = arrays["cross_attention_mask"].sum((2, 3)) * (segments > 0)
    return Counts(
        *(tokens, pairs, learned),
        seeing=int((tiles_seen > 0).sum()),
        images=int(is_picture.sum()),
        image_tokens=int(arrays["aspect_ratio_mask"][is_picture].sum()) * patches,
        seen=int(tiles_seen.sum()) * patches,
    )


@dataclass(frozen=True)
class StepFlops:
    """What training costs for each of a batch's `Counts`, forward and backward."""

    tokens: float
    pairs: float
    labels: float
    seeing: float
    images: float
    image_tokens: float
    seen: float

    def of(self, counts: Counts) -> float:
        """The operations of a step on a batch."""
        return sum(getattr(self, name) * number for name, number in vars(counts).items())


def step_flops(model: MllamaForConditionalGeneration, recipe: Recipe) -> StepFlops:
    """The formula for a model of which the recipe says what is trained."""
    config = model.full_config
    is_full = {name: mode == "full" for name, mode in recipe.trained.modes.items()}
    has_part = {name: mode != "frozen" for name, mode in recipe.trained.modes.items()}
    of_images, images_learn = _before_decoder(config, is_full, has_part)
    found = dict.fromkeys(StepFlops.__dataclass_fields__, 0.0) | {"images": of_images}

    text = decoder_flops(config, 1, 1, 0)
    both = decoder_flops(config, 1, 1, 1)
    layers, num_cross = config.text_config.num_hidden_layers, len(_cross_layers(config))
    mlp = both["decoder MLPs"].total / layers
    self_flops = text["decoder self-attention"]
    cross_flops, keys_values = both["decoder cross-attention"], both["image keys and values"]
    per_image = image_length(config)
    learns = is_full["embeddings"]  # whether anything before this layer is trained
    for layer in range(layers):
        is_cross = config.text_config.is_cross_attention_layer(layer)
        name = "cross_attention" if is_cross else "self_attention"
        sees_trained = is_cross and images_learn
        passes = learns or has_part[name] or sees_trained
        times = 1 + passes + is_full[name]
        if is_cross:
            found["seeing"] += times * (cross_flops.projections / num_cross + mlp)
            back = (learns or has_part[name]) + (images_learn or has_part[name])
            found["seen"] += (1 + back) * cross_flops.attention / num_cross / per_image
            kv = keys_values.projections / num_cross / per_image
            found["image_tokens"] += (1 + images_learn + is_full[name]) * kv
        else:
            of_self = layers - num_cross
            found["tokens"] += times * (self_flops.projections / of_self + mlp)
            found["pairs"] += (1 + 2 * passes) * self_flops.attention / of_self
        learns = passes or (is_cross and has_part["gates"])
    found["labels"] = (1 + learns + is_full["head"]) * both["head"].total
    for name, flops in _adapters(model, recipe).items():
        found[name] += 3 * flops
    return StepFlops(**found)


def _before_decoder(
    config: MllamaConfig, is_full: Mapping[str, bool], has_part: Mapping[str, bool]
) -> tuple[float, bool]:
    """Operations of a picture in encoder and projector, and whether any of it is trained.

    Of a picture all tiles count that the encoder has room for: those that are empty take part in
    its attention, by the model's formula.
    """
    vision, parts = config.vision_config, vision_flops(config, 1)
    encoder = parts["vision encoder"]
    patches = vision.max_num_tiles * (vision.num_patches - 1)
    embedding = 2 * patches * vision.patch_size**2 * vision.num_channels * vision.hidden_size
    num_layers = vision.num_hidden_layers + vision.num_global_layers
    projections = (encoder.projections - embedding) / num_layers
    attention = encoder.attention / num_layers
    total: float = (1 + 2 * is_full["vision_local"]) * embedding
    learns = False
    for name, number in (
        ("vision_local", vision.num_hidden_layers),
        ("vision_global", vision.num_global_layers),
    ):
        learns = learns or has_part[name]
        total += number * (1 + learns + is_full[name]) * projections
        total += number * (1 + 2 * learns) * attention
        learns = learns or has_part["vision_gates"]
    learns = learns or has_part["projector"]
    total += (1 + learns + is_full["projector"]) * parts["projector"].total
    return total, learns


def _adapters(model: MllamaForConditionalGeneration, recipe: Recipe) -> dict[str, float]:
    """Forward operations of adapters, by the field of `Counts` that they are done for."""
    config = model.full_config
    places = {"vision_local": encoded_length(config), "vision_global": encoded_length(config)}
    found: dict[str, float] = {}
    for path, adapter in adapters_of(model, recipe).items():
        component, field, times = component_of(model, path), "tokens", 1
        if component in places:
            field, times = "images", places[component]
        elif component == "projector":
            field, times = "images", image_length(config)
        elif component == "head":
            field = "labels"
        elif component == "cross_attention":
            field = "image_tokens" if path[-1] in ("k_proj", "v_proj") else "seeing"
        flops = 2 * times * (np.prod(adapter.a) + np.prod(adapter.b))
        found[field] = found.get(field, 0.0) + float(flops)
    return found


def _cross_layers(config: MllamaConfig) -> tuple[int, ...]:
    return tuple(config.text_config.cross_attention_layers)

"""What can be said about the model, what of it is trained, and the optimizer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from omegaconf import MISSING

from mllama_jax.attention import ATTENTION_KINDS
from mllama_jax.execution import REMAT_POLICIES
from mllama_jax.quantisation import LARGEST

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("frozen", "lora", "full")
OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclass(frozen=True)
class ModelConfig:
    """The model that training starts from."""

    path: str = MISSING
    """Hugging Face folder (or hub id) with configuration, weights, tokenizer and processor."""
    dtype: str = "float32"
    """What the model computes in."""
    param_dtype: str = "float32"
    """What the parameters are kept in; gates and adapters are float32 in any case. Parameters that
    are trained want float32: most steps are smaller than what bfloat16 tells apart."""
    quantise: str | None = None
    """int8, int4 or nf4 stores the kernels of the decoder's layers so; these can't be trained, but
    adapters beside them can (QLoRA)."""
    attention: str = "xla"
    remat: str = "none"
    """What the backward pass recomputes instead of keeping it: none, dots (all but the products
    with weights), attention (all but attention's results), full (all but each layer's input)."""
    images_at_once: int | None = None
    """Pictures that a device encodes at a time; null for all of its share of a batch."""


@dataclass(frozen=True)
class ComponentConfig:
    """How a component of the model is trained."""

    mode: str | None = None
    """frozen, lora (adapters beside its projections) or full; null leaves it to the preset."""
    learning_rate: float | None = None
    """The peak; null for the optimizer's."""
    weight_decay: float | None = None
    """Null for the optimizer's."""


@dataclass(frozen=True)
class TrainedConfig:
    """What is trained: a preset, and components that are treated otherwise."""

    preset: str = "adapters"
    """adapters (Meta's recipe: all but the language model's own layers, embeddings and head),
    cross_attention (projector, cross-attention layers and their gates), all, frozen (nothing but
    what is named below), lora (adapters on all projections of the decoder's layers), lora_all (on
    those of vision encoder and projector, too)."""
    vision_local: ComponentConfig = field(default_factory=ComponentConfig)
    """The vision encoder's embeddings and local layers."""
    vision_global: ComponentConfig = field(default_factory=ComponentConfig)
    """The vision encoder's global layers, with the norm and the tile embedding before them."""
    vision_gates: ComponentConfig = field(default_factory=ComponentConfig)
    """Gates of the global layers and of the position and tile embeddings."""
    projector: ComponentConfig = field(default_factory=ComponentConfig)
    self_attention: ComponentConfig = field(default_factory=ComponentConfig)
    """The decoder's self-attention layers, MLPs and norms included."""
    cross_attention: ComponentConfig = field(default_factory=ComponentConfig)
    """The decoder's cross-attention layers, MLPs and norms included, gates not."""
    gates: ComponentConfig = field(default_factory=ComponentConfig)
    """Of the cross-attention layers."""
    embeddings: ComponentConfig = field(default_factory=ComponentConfig)
    """Of tokens."""
    head: ComponentConfig = field(default_factory=ComponentConfig)
    """The last norm and the projection onto the vocabulary."""

    @property
    def components(self) -> dict[str, ComponentConfig]:
        """By name."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def modes(self) -> dict[str, str]:
        """How each component is trained, by name."""
        return {
            name: component.mode or PRESETS[self.preset].get(name, "frozen")
            for name, component in self.components.items()
        }


COMPONENTS = tuple(item.name for item in fields(TrainedConfig) if item.name != "preset")
_VISION = ("vision_local", "vision_global")
_DECODER = ("self_attention", "cross_attention")
_BESIDE = ("projector", "cross_attention", "gates")
"""What is beside the language model that only reads text."""
PRESETS: dict[str, dict[str, str]] = {
    "adapters": dict.fromkeys((*_VISION, "vision_gates", *_BESIDE), "full"),
    "cross_attention": dict.fromkeys(_BESIDE, "full"),
    "all": dict.fromkeys(COMPONENTS, "full"),
    "frozen": {},
    "lora": dict.fromkeys(_DECODER, "lora"),
    "lora_all": dict.fromkeys((*_VISION, "projector", *_DECODER), "lora"),
}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the components whose mode is lora."""

    rank: int = 16
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("*",)
    """Which of these components' projections have an adapter: patterns of their paths, such as
    */q_proj."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Only projections are decayed: no norms, biases, gates or embeddings."""

    name: str = "adamw"
    """adamw; adafactor (a second moment by rows and columns, none of the first); muon (for the
    layers' projections, and AdamW for all else; updates as large as AdamW's, so of its learning
    rates)."""
    learning_rate: float = 1e-5
    """The peak, reached after a linear warm-up."""
    schedule: str = "cosine"
    """What follows the warm-up: cosine and linear fall until the last step, wsd stays at the peak
    and falls linearly at the end, constant stays."""
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    """Of wsd: the part of all steps in which it falls."""
    final_fraction: float = 0.1
    """The last step's learning rate, as a fraction of the peak."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    # Library (optax) states of 8 bits there are none, and a second moment in bfloat16 would stand
    # still: with b2=0.999 its steps are smaller than what bfloat16 tells apart.
    moment_dtype: str | None = None
    """What the first moment is kept in, such as bfloat16; null for float32. The second one is
    float32 in any case."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it; .inf leaves all as they are."""
    microbatches: int = 1
    """Parts of a batch that a step works through one after the other: less memory, and the same
    gradients as of the whole batch."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which is added to the loss."""
    max_skipped: int = 10
    """Steps in a row that may be skipped, as loss or gradients were not finite or nothing was to
    be learned from the batch; one more ends the run."""


@dataclass(frozen=True)
class Recipe:
    """All that decides what a step does, beside the model."""

    steps: int
    """Of the run: they shape the learning rate."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trained: TrainedConfig = field(default_factory=TrainedConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


def model_problems(config: ModelConfig) -> Iterator[str]:
    """What is wrong with the settings, each a line with its key."""
    yield from _choice("model.dtype", config.dtype, DTYPES)
    yield from _choice("model.param_dtype", config.param_dtype, DTYPES)
    yield from _choice("model.attention", config.attention, ATTENTION_KINDS)
    yield from _choice("model.remat", config.remat, tuple(REMAT_POLICIES))
    if config.quantise is not None and config.quantise not in LARGEST:
        yield f"model.quantise={config.quantise!r}: expected one of {', '.join(LARGEST)}, or null"
    if config.images_at_once is not None and config.images_at_once < 1:
        yield (
            f"model.images_at_once={config.images_at_once!r}: expected a number above 0, or null "
            "for all"
        )


def recipe_problems(recipe: Recipe) -> Iterator[str]:
    """As `model_problems`."""
    yield from _optimizer_problems(recipe.optimizer, recipe.steps)
    yield from _choice("trained.preset", recipe.trained.preset, tuple(PRESETS))
    for name, component in recipe.trained.components.items():
        at = f"trained.{name}"
        if component.mode is not None:
            yield from _choice(f"{at}.mode", component.mode, MODES)
        if component.learning_rate is not None:
            yield from _positive(f"{at}.learning_rate", component.learning_rate)
        if component.weight_decay is not None:
            yield from _not_negative(f"{at}.weight_decay", component.weight_decay)
    yield from _positive("lora.rank", recipe.lora.rank)
    yield from _positive("lora.alpha", recipe.lora.alpha)
    if not recipe.lora.targets:
        yield "lora.targets=(): expected patterns of the projections that get an adapter"
    is_known = recipe.trained.preset in PRESETS
    if is_known and recipe.lora != LoraConfig() and "lora" not in recipe.trained.modes.values():
        yield (
            f"lora: given, but nothing is trained by adapters with trained.preset="
            f"{recipe.trained.preset}; expected trained.preset=lora, or a component with mode lora"
        )


def _optimizer_problems(config: OptimizerConfig, steps: int) -> Iterator[str]:
    yield from _choice("optimizer.name", config.name, OPTIMIZERS)
    yield from _choice("optimizer.schedule", config.schedule, SCHEDULES)
    if config.moment_dtype is not None:
        yield from _choice("optimizer.moment_dtype", config.moment_dtype, DTYPES)
    for name in ("learning_rate", "eps", "microbatches"):
        yield from _positive(f"optimizer.{name}", getattr(config, name))
    for name in ("weight_decay", "z_loss", "warmup_steps", "max_skipped"):
        yield from _not_negative(f"optimizer.{name}", getattr(config, name))
    if not config.max_grad_norm > 0:
        yield f"optimizer.max_grad_norm={config.max_grad_norm!r}: expected a number above 0"
    for name in ("b1", "b2"):
        if not 0 <= (value := getattr(config, name)) < 1:
            yield f"optimizer.{name}={value!r}: expected at least 0 and below 1"
    if not 0 <= config.final_fraction <= 1:
        yield f"optimizer.final_fraction={config.final_fraction!r}: expected 0 to 1"
    if not 0 < config.decay_fraction <= 1:
        yield f"optimizer.decay_fraction={config.decay_fraction!r}: expected above 0 and at most 1"
    if config.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps={config.warmup_steps!r}: expected fewer than steps={steps!r}"
        )


def _choice(key: str, value: str, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        yield f"{key}={value!r}: expected {' or '.join(choices)}"


def _positive(key: str, value: float) -> Iterator[str]:
    if not value > 0:
        yield f"{key}={value!r}: expected a number above 0"
    elif value == math.inf:
        yield f"{key}={value!r}: expected a finite number"


def _not_negative(key: str, value: float) -> Iterator[str]:
    if not value >= 0:
        yield f"{key}={value!r}: expected 0 or more"
    elif value == math.inf:
        yield f"{key}={value!r}: expected a finite number"

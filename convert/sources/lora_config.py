"""adapter_config.json of a LoRA adapter: ranks and scales of its modules, and what is refused."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from mllama_jax.convert.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"

_PLAIN_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is."""

_REFUSED = {
    "use_dora": "DoRA also rescales the columns of the weights",
    "use_qalora": "QA-LoRA pools its inputs, which no weight of the model does",
    "lora_bias": "biases of lora_B are not read",
    "alora_invocation_tokens": "an activated LoRA holds only behind its invocation tokens",
    "arrow_config": "an arrow router chooses among several adapters",
    "layer_replication": "the model has more layers than its base",
    "megatron_config": "Megatron's parallel layers are not read",
    "target_parameters": "adapters of single parameters are not read",
    "trainable_token_indices": "embeddings of single tokens are not read",
}
"""Settings that a merge of A and B does not cover -> why, for the error."""

_USED = (
    *("base_model_name_or_path", "revision", "peft_type", "init_lora_weights", "modules_to_save"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
)
_WITHOUT_EFFECT = (
    # Where the adapters are is told by the tensors' names.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    # Of training.
    *("auto_mapping", "inference_mode", "lora_dropout", "peft_version", "runtime_config"),
    *("task_type", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    # PEFT itself passes over it in layers that store (outputs, inputs), as all of Mllama's do.
    "fan_in_fan_out",
)


@dataclass(frozen=True)
class LoraConfig:
    """What of an adapter's configuration bears on its merged weights.

    Attributes:
        rank, rank_pattern: r, and the ranks of modules that a pattern matches.
        alpha, alpha_pattern: the same for the numerator of the scale.
        use_rslora: divide alpha by the root of the rank and not by the rank.
        modules_to_save: names of modules that the adapter holds as a whole.
        base: the model that the adapter was trained on: a hub id, or a path on whatever machine
            that was.
        base_revision: branch, tag or commit of the base.
    """

    rank: int
    rank_pattern: Mapping[str, int]
    alpha: float
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    modules_to_save: tuple[str, ...]
    base: str | None
    base_revision: str | None

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of B and A is multiplied with."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The first entry whose regular expression is the end of the module's name, as in PEFT."""
    for expression, value in pattern.items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return value
    return otherwise


def read_lora_config(folder: epath.Path) -> LoraConfig:
    """Reads adapter_config.json.

    Raises:
        FileNotFoundError: it is absent.
        CheckpointError: it is damaged, or describes an adapter that can't be merged exactly; all
            reasons in one message.
    """
    values = _read(folder / CONFIG_NAME)
    problems = [*_refusals(values), *_invalid(values)]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{folder / CONFIG_NAME}: this adapter can't be merged:\n{lines}")
    return LoraConfig(
        rank=values["r"],
        rank_pattern=values.get("rank_pattern") or {},
        alpha=values["lora_alpha"],
        alpha_pattern=values.get("alpha_pattern") or {},
        use_rslora=bool(values.get("use_rslora")),
        modules_to_save=tuple(values.get("modules_to_save") or ()),
        base=values.get("base_model_name_or_path") or None,
        base_revision=values.get("revision") or None,
    )


def _read(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected the folder of a PEFT adapter")
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _refusals(values: Mapping[str, Any]) -> list[str]:
    """Why the weights are not the base's plus scaled products of B and A."""
    kind = values.get("peft_type")
    if kind != "LORA":
        return [f"peft_type={kind!r}: expected 'LORA'"]
    found = [f"{name}: {why}" for name, why in _REFUSED.items() if values.get(name)]
    init = values.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        found.append(
            f"init_lora_weights={init!r}: such training begins by taking A and B out of the base, "
            "so they fit that changed base only; save the adapter again with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    known = {*_REFUSED, *_USED, *_WITHOUT_EFFECT}
    return found + [
        f"{name}={value!r:.80}: unknown setting, perhaps of a newer PEFT; merge it there"
        for name, value in values.items()
        if value and name not in known
    ]


def _invalid(values: Mapping[str, Any]) -> list[str]:
    """Values that are not what their names say."""
    found = []
    for name, pattern, kinds, what in (
        ("r", "rank_pattern", (int,), "a positive integer"),
        ("lora_alpha", "alpha_pattern", (int, float), "a number"),
    ):
        patterns = values.get(pattern) or {}
        if not isinstance(patterns, Mapping):
            found.append(f"{pattern}={patterns!r:.80}: expected a mapping from patterns")
            continue
        for where, value in ((name, values.get(name)), *patterns.items()):
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or (name == "r" and value <= 0):
                found.append(f"{where}={value!r}: expected {what}")
        found += [
            f"{pattern}: {text}: not a regular expression"
            for text in patterns
            if not _is_expression(text)
        ]
    whole = values.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        found.append(f"modules_to_save={whole!r:.80}: expected a list of names")
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(values.get(name), str | None):
            found.append(f"{name}={values[name]!r:.80}: expected a string")
    return found


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True

"""The mapping that processors return."""

from typing import Any

import jax


class BatchFeature(dict[str, Any]):
    """A processor's output: a dict whose fields can also be read as attributes.

    `batch["pixel_values"]`, `batch.pixel_values` and `model.apply(variables, **batch)` all work.
    It is a JAX pytree, so it can be passed to a jitted function, `jax.tree.map` and
    `jax.device_put` as it is (leave out or pop fields that are not arrays, such as `num_tiles`).

    Raises:
        AttributeError: a field that is not there is read as an attribute (as an item: KeyError),
            or an attribute is assigned; assign items instead.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r} in this batch; it has {list(self)}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]


def _flatten(batch: BatchFeature) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(sorted(batch))
    return [(jax.tree_util.DictKey(name), batch[name]) for name in names], names


def _unflatten(names: tuple[str, ...], values: Any) -> BatchFeature:
    return BatchFeature(zip(names, values, strict=True))


jax.tree_util.register_pytree_with_keys(BatchFeature, _flatten, _unflatten)

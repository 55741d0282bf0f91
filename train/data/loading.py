"""A record's pictures, read."""

from typing import Any

from mllama_jax.processing.image_loading import load_picture
from mllama_jax.train.data.pictures import readable
from mllama_jax.train.data.records import BadRecord, Record


def load_pictures(record: Record, convert_rgb: bool) -> list[Any]:
    """All of them, in order.

    Raises:
        BadRecord: some can't be read; names each.
    """
    pictures, wrong = [], []
    for index, picture in enumerate(record.images):
        try:
            loaded = load_picture(
                readable(picture), where=f"image {index}", convert_rgb=convert_rgb
            )
        except (ValueError, TypeError, OSError) as error:
            wrong.append(str(error))
        else:
            pictures.append(loaded.image)
    if wrong:
        raise BadRecord(record.where, "; ".join(wrong))
    return pictures

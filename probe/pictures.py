"""Images kept beside a store: small ones as PNG, which is exact, larger ones as JPEG.

`images-NNNNN.parquet`, one a shard: image, doc, seed, prompt, height, width, format, data (bytes).
"""

import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import UInt8
from torch import Tensor

from probe.errors import UserError
from probe.runs import atomic_path

PNG_PIXELS = 128
"""The longest side of an image that is kept exactly."""
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image that was drawn, and all it takes to draw it again."""

    image: int
    """Its number in the store."""
    doc: int
    """Number of its prompt."""
    seed: int
    """The seed of its noise."""
    prompt: str
    """What was asked for."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    format: str
    """`png` or `jpeg`."""
    data: bytes
    """The encoded image."""


SCHEMA = pyarrow.schema(
    [
        ("image", pyarrow.int32()),
        ("doc", pyarrow.int32()),
        ("seed", pyarrow.int64()),
        ("prompt", pyarrow.string()),
        ("height", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("format", pyarrow.string()),
        ("data", pyarrow.binary()),
    ]
)


def encode(pixels: UInt8[Tensor, "h w 3"]) -> tuple[str, bytes]:
    """An image's format and bytes."""
    from PIL import Image

    small = max(pixels.shape[:2]) <= PNG_PIXELS
    file = io.BytesIO()
    options = {"format": "PNG"} if small else {"format": "JPEG", "quality": JPEG_QUALITY}
    Image.fromarray(pixels.numpy()).save(file, **options)
    return ("png" if small else "jpeg"), file.getvalue()


def decode(data: bytes) -> UInt8[Tensor, "h w 3"]:
    """The pixels of an encoded image."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def write_pictures(path: Path, pictures: list[Picture]) -> None:
    """Write a shard's images, whole or not at all."""
    table = pyarrow.Table.from_pylist([asdict(picture) for picture in pictures], schema=SCHEMA)
    with atomic_path(path) as temporary:
        # The images are compressed already, and a column's statistics would repeat two of them.
        pyarrow.parquet.write_table(
            table,
            temporary,
            compression="none",
            use_dictionary=False,
            write_statistics=["image", "doc"],  # type: ignore[arg-type]
        )


def pictures_path(folder: Path, number: int) -> Path:
    """The file of a shard's kept images."""
    return folder / f"images-{number:05d}.parquet"


def read_picture(folder: Path, image: int) -> Picture:
    """A kept image of a store. Raises `UserError` where it was not kept."""
    first = pictures_path(folder, 0)
    if first.is_file():
        # The first images are kept, and every file but the last has as many of them.
        in_file = pyarrow.parquet.ParquetFile(first).metadata.num_rows
        path = pictures_path(folder, image // in_file)
        if path.is_file():
            found = pyarrow.parquet.read_table(path, filters=[("image", "==", image)])
            for row in found.to_pylist():
                return Picture(**{field.name: row[field.name] for field in fields(Picture)})
    raise UserError(
        f"{folder} has not kept image {image}; draw it again from its prompt and seed, or capture "
        "with --keep-images."
    )

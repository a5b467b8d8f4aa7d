"""Images for the k-sparse study: MNIST in IDX files, or the digits that scikit-learn carries.

IDX (LeCun, Cortes and Burges, the MNIST database) is big-endian: two zero bytes, a type (0x08 for
unsigned bytes, the only one read here), the number of axes, the length of each axis in four bytes,
then the data. Files may be compressed with gzip, whatever their name. `NAME-images-idx3-ubyte` goes
with `NAME-labels-idx1-ubyte` (some copies write `NAME-images.idx3-ubyte`).

Pixels become `value / 255` (digits: / 16), in [0, 1], nothing else: standardising them changes the
numbers of the 2013 paper.

Three parts, drawn once with a fixed seed: dictionaries and probes learn from `train`; choices
(penalty, k, alpha, components) are made on `validation`; what is reported comes from `test`. A
folder with both `train-*` and `t10k-*` keeps MNIST's own test set.
"""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, UInt8
from sklearn.datasets import load_digits

from probe.errors import Failure, UserError

TEST_SHARE = 0.2
"""Share of the images kept for the test where the data have no test set of their own."""
VALIDATION_SHARE = 0.125
"""Share of the training images on which choices are made."""
SPLIT_SEED = 0
"""Seed of the division; the same for every training seed, so that methods meet the same images."""
UNSIGNED_BYTE = 8
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Some images with their classes."""

    pixels: Float32[np.ndarray, "n d"]
    """Brightness in [0, 1], a row an image."""
    labels: Int[np.ndarray, " n"]
    """Class of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageData:
    """A data set in its three parts."""

    name: str
    """What it is called in a report: the name of the folder of IDX files, or `digits`."""
    source: str
    """Where it is from: the names of the files."""
    shape: tuple[int, int]
    """Height and width in pixels."""
    checksum: str
    """SHA-256 of all pixels and labels as read."""
    train: Images
    """What dictionaries and probes learn from."""
    validation: Images
    """What choices are made on."""
    test: Images
    """What is reported on."""

    @property
    def d(self) -> int:
        """Pixels of an image."""
        return math.prod(self.shape)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of training, validation and test images."""
        return len(self.train.labels), len(self.validation.labels), len(self.test.labels)


def load_images(spec: str) -> ImageData:
    """The images that `spec` names, divided.

    Args:
        spec: `digits`, or a folder of IDX files, or one of its files of images.

    Raises:
        UserError: there is nothing of the kind at that place, or images and labels do not match.
        Failure: a file is damaged.
    """
    if spec == "digits":
        return _digits()
    path = Path(spec)
    found = _image_files(path)
    name = (path if path.is_dir() else path.parent).resolve().name or "images"
    source = ", ".join(file.name for file in found)
    sets = {file.name.partition("images")[0]: _read_pair(file) for file in found}
    shapes = {pixels.shape[1:] for pixels, _ in sets.values()}
    if len(shapes) > 1:
        raise UserError(
            f"the images in {path} have several sizes ({shapes}); name one file of them instead."
        )
    tests = [name for name in sets if name.startswith(("t10k", "test"))]
    if len(sets) == 2 and len(tests) == 1:
        (learnt,) = (pair for name, pair in sets.items() if name not in tests)
        return _divided(name, source, 255, learnt, sets[tests[0]])
    if len(sets) > 1:
        raise UserError(
            f"{path} holds {len(sets)} sets of images ({source}) "
            "where one, or train-* with t10k-*, was wanted; name one file of them instead."
        )
    return _divided(name, source, 255, next(iter(sets.values())), None)


def read_idx(path: Path) -> UInt8[np.ndarray, "*n"]:
    """The array in an IDX file of unsigned bytes, compressed or not.

    Raises `UserError` where there is no such file, `Failure` where it is something else or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; give the folder that holds the IDX files.")
    content = path.read_bytes()
    if content[:2] == GZIP_MAGIC:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise Failure(f"{path} is a damaged gzip file ({error}); fetch it again.") from error
    return _parse_idx(content, path)


def _parse_idx(content: bytes, path: Path) -> UInt8[np.ndarray, "*n"]:
    n_axes = content[3] if len(content) >= 4 else 0
    start = 4 + 4 * n_axes
    if content[:3] != bytes((0, 0, UNSIGNED_BYTE)) or not n_axes or len(content) < start:
        raise Failure(
            f"{path} does not begin like an IDX file of unsigned bytes (00 00 08, then the number "
            f"of axes) but with {content[:4].hex(' ') or 'nothing'}; fetch it again."
        )
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", n_axes, offset=4))
    size = math.prod(shape)
    if len(content) - start != size:
        raise Failure(
            f"{path} should hold {' x '.join(map(str, shape))} = {size} bytes and holds "
            f"{len(content) - start}; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _image_files(path: Path) -> list[Path]:
    """The files of images at a place. Raises `UserError` where there is none."""
    if path.is_file() and "images" in path.name:
        return [path]
    found: dict[str, Path] = {}
    if path.is_dir():
        for file in sorted(path.glob("*images?idx3-ubyte*")):
            found.setdefault(file.name.partition("images")[0], file)
    if not found:
        raise UserError(
            f"{path} holds no images in IDX files (NAME-images-idx3-ubyte, .gz or not); give a "
            "folder of them, or `digits` for those that scikit-learn carries."
        )
    return list(found.values())


def _read_pair(file: Path) -> tuple[UInt8[np.ndarray, "n h w"], UInt8[np.ndarray, " n"]]:
    """Images and the labels beside them."""
    name = file.name.partition("images")[0]
    labels = sorted(file.parent.glob(f"{name}labels?idx1-ubyte*"))
    if not labels:
        raise UserError(f"no labels ({name}labels-idx1-ubyte, .gz or not) lie beside {file}.")
    pixels, classes = read_idx(file), read_idx(labels[0])
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise UserError(
            f"{file} has the shape {pixels.shape} and {labels[0]} {classes.shape}; as many labels "
            "as images of height x width were wanted."
        )
    return pixels, classes


def _digits() -> ImageData:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries (Alpaydin and Kaynak 1998)."""
    rows, labels = load_digits(return_X_y=True)
    pixels = np.asarray(rows, dtype=np.uint8).reshape(-1, 8, 8)
    both = (pixels, np.asarray(labels, dtype=np.uint8))
    return _divided("digits", "scikit-learn's 8 x 8 pixels", 16, both, None)


def _divided(
    name: str,
    source: str,
    brightest: int,
    learnt: tuple[UInt8[np.ndarray, "n h w"], UInt8[np.ndarray, " n"]],
    test: tuple[UInt8[np.ndarray, "m h w"], UInt8[np.ndarray, " m"]] | None,
) -> ImageData:
    digest = hashlib.sha256()
    for array in (*learnt, *(test or ())):
        digest.update(np.ascontiguousarray(array).tobytes())
    order = np.random.default_rng(SPLIT_SEED).permutation(len(learnt[0]))
    n_test = 0 if test is not None else round(TEST_SHARE * len(order))
    n_validation = round(VALIDATION_SHARE * (len(order) - n_test))
    if n_validation < 1 or len(order) - n_test - n_validation < 1:
        raise UserError(f"{len(order)} images are too few to divide; give some dozens at least.")
    cuts = [len(order) - n_test - n_validation, len(order) - n_test]
    training, validation, own_test = np.split(order, cuts)
    return ImageData(
        name=name,
        source=source,
        shape=(learnt[0].shape[1], learnt[0].shape[2]),
        checksum=digest.hexdigest(),
        train=_images(*learnt, training, brightest),
        validation=_images(*learnt, validation, brightest),
        test=_images(*learnt, own_test, brightest)
        if test is None
        else _images(*test, np.arange(len(test[0])), brightest),
    )


def _images(
    pixels: UInt8[np.ndarray, "n h w"],
    labels: UInt8[np.ndarray, " n"],
    chosen: Int[np.ndarray, " m"],
    brightest: int,
) -> Images:
    rows = pixels[chosen].reshape(len(chosen), -1).astype(np.float32) / np.float32(brightest)
    return Images(pixels=rows, labels=labels[chosen].astype(np.int64))

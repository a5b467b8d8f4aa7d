"""Images: IDX files written byte by byte here, scikit-learn's digits, and damage."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from analyses.images import load_images, read_idx
from probe.errors import Failure, UserError

N = 80
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (N, 3, 2), dtype=np.uint8)
LABELS = RNG.integers(0, 10, N, dtype=np.uint8)


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """An IDX file as its description says."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return head + array.tobytes()


def write(folder: Path, name: str = "train", *, n: int = N, packed: bool = False) -> Path:
    """The first `n` images and labels in a folder, by the names that MNIST has."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, content in (("images-idx3", PIXELS[:n]), ("labels-idx1", LABELS[:n])):
        data = idx(content)
        path = folder / f"{name}-{part}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


def test_idx_by_hand(tmp_path):
    path = tmp_path / "x-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 255]))
    assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize("packed", [False, True])
def test_idx_compressed_or_not_whatever_the_name(tmp_path, packed):
    content = idx(PIXELS)
    path = tmp_path / "plain"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert np.array_equal(read_idx(path), PIXELS)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "nothing"),
        (b"\x00\x00", "with 00 00"),
        (b"PK\x03\x04 and more", "with 50 4b 03 04"),
        (idx(PIXELS, kind=13), "with 00 00 0d 03"),
        (idx(PIXELS)[:-1], f"{N} x 3 x 2 = {6 * N} bytes and holds {6 * N - 1}"),
        (idx(PIXELS) + b"!", f"holds {6 * N + 1}"),
        (bytes([0, 0, 8, 3, 0, 0]), "with 00 00 08 03"),
        (gzip.compress(idx(PIXELS))[:-20], "damaged gzip"),
        (b"\x1f\x8b and no more", "damaged gzip"),
    ],
)
def test_damage_is_told_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "t-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(Failure, match=sentence):
        read_idx(path)


def test_a_single_set_is_divided_once_and_for_all(tmp_path):
    data = load_images(str(write(tmp_path / "letters")))
    assert (data.name, data.source) == ("letters", "train-images-idx3-ubyte")
    assert (data.shape, data.d, data.sizes) == ((3, 2), 6, (56, 8, 16))
    parts = (data.train, data.validation, data.test)
    rows = np.concatenate([part.pixels for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    pairs = {(tuple(np.round(row * 255)), label) for row, label in zip(rows, labels, strict=True)}
    wanted = {(tuple(row), label) for row, label in zip(PIXELS.reshape(N, 6), LABELS, strict=True)}
    assert pairs == wanted and len(wanted) == N
    again = load_images(str(tmp_path / "letters" / "train-images-idx3-ubyte"))
    assert np.array_equal(again.train.pixels, data.train.pixels)
    assert (again.name, again.checksum) == ("letters", data.checksum)


def test_mnists_own_test_set_is_kept(tmp_path):
    folder = write(write(tmp_path / "both", packed=True), "t10k", n=24)
    data = load_images(str(folder))
    assert data.sizes == (70, 10, 24)
    assert np.array_equal(data.test.labels, LABELS[:24])
    assert np.array_equal(np.round(data.test.pixels * 255), PIXELS[:24].reshape(24, 6))
    assert data.source == "t10k-images-idx3-ubyte, train-images-idx3-ubyte.gz"


def test_packed_and_plain_beside_each_other_are_one_set(tmp_path):
    folder = write(write(tmp_path / "twice"), packed=True)
    assert load_images(str(folder)).checksum == load_images(str(write(tmp_path / "once"))).checksum


def test_mistakes_are_told_in_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    three = write(write(write(tmp_path / "three"), "t10k"), "extra")
    bare = write(tmp_path / "bare")
    (bare / "train-labels-idx1-ubyte").unlink()
    short = write(tmp_path / "short")
    (short / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:-1]))
    sizes = write(write(tmp_path / "sizes"), "t10k")
    (sizes / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[:, :2]))
    mistakes = {
        tmp_path / "nowhere": "holds no images in IDX files",
        tmp_path / "empty": "holds no images in IDX files",
        three: "holds 3 sets of images",
        bare: "no labels",
        short: "as many labels as images",
        sizes: "several sizes",
        write(tmp_path / "few", n=2): "too few to divide",
    }
    for path, sentence in mistakes.items():
        with pytest.raises(UserError, match=sentence):
            load_images(str(path))


def test_digits_are_scikit_learns():
    data = load_images("digits")
    rows, labels = load_digits(return_X_y=True)
    assert (data.name, data.shape, data.sizes) == ("digits", (8, 8), (1258, 180, 359))
    assert data.train.pixels.dtype == np.float32 and data.train.pixels.max() == 1.0
    total = sum(part.pixels.sum() for part in (data.train, data.validation, data.test))
    assert total == pytest.approx(np.asarray(rows).sum() / 16, rel=1e-5)
    parts = np.concatenate([data.train.labels, data.validation.labels, data.test.labels])
    assert sorted(parts) == sorted(labels)

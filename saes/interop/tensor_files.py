"""Files of tensors and folders of files, with one sentence for each way they can be wrong.

Pickles are opened by `torch.load(weights_only=True)` alone: it rebuilds tensors, numbers, strings
and containers of them, and runs no code that a file names.
"""

import contextlib
import json
import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probe.errors import Failure, UserError
from probe.runs import atomic_path

PICKLES = (".pt", ".pth")
"""Endings of files of `torch.save`."""
BROKEN = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OSError,
)  # fmt: skip
"""What a damaged pickle makes `torch.load` raise."""
UNSUPPORTED = re.compile(r"(?:GLOBAL|global|class|function) ([A-Za-z_][\w.]*\.\w+)")


def read_description(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `Failure` where the file is missing or holds something else."""
    if not path.is_file():
        raise Failure(f"{path} is missing; download or save the SAE again.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise Failure(f"{path} is not valid JSON ({error}); download or save it again.") from error
    if not isinstance(found, dict):
        raise Failure(f"{path} does not describe an SAE (it is no JSON object); download it again.")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `Failure` where it is missing or damaged."""
    if not path.is_file():
        raise Failure(f"{path} is missing; download or save the SAE again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Failure(f"{path} is damaged ({_line(error)}); download or save it again.") from error


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`.

    Raises `Failure` where the file is missing or damaged, holds no dictionary, or asks for code of
    its maker's to be run.
    """
    found = _unpickled(path)
    if not isinstance(found, dict):
        raise Failure(
            f"{path} holds a {type(found).__name__} where a dictionary of tensors was wanted; save "
            "the SAE's state_dict() and read that."
        )
    return dict(found)


def read_vector(path: Path, length: int) -> Tensor:
    """The one tensor in a file of `torch.save`, of that many finite numbers, in float32.

    Raises `Failure` as `read_pickle` and `checked` do.
    """
    return checked(path, {path.stem: _unpickled(path)}, {path.stem: (length,)})[path.stem]


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise Failure(f"{path} is missing; download or save the SAE again.")
    try:
        # Memory-mapped where the file allows: to look at the names costs next to nothing.
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except BROKEN as error:
        named = UNSUPPORTED.search(str(error))
        if named or "weights_only" in str(error):
            what = named[1] if named else "an object"
            raise Failure(
                f"{path} holds more than tensors and numbers ({what}) and could run its maker's "
                "code, so it is not opened: save the SAE's state_dict() alone, and read that."
            ) from error
        raise Failure(f"{path} is damaged ({_line(error)}); download or save it again.") from error


def matrix_shape(path: Path, tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Rows and columns of one tensor. Raises `Failure` where it is missing or no matrix."""
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.numel():
        got = list(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
        raise Failure(f"{path} should hold a matrix {name} and holds {got}; save the SAE again.")
    return tensor.shape[0], tensor.shape[1]


def checked(
    path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The tensors named in `shapes`, in float32.

    Raises `Failure` where one is missing, of another shape, not of real numbers, or not finite.
    """
    found = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(shape):
            got = list(tensor.shape) if isinstance(tensor, Tensor) else "nothing"
            raise Failure(
                f"{path} should hold {name} of shape {list(shape)} and holds {got}; its files do "
                "not belong together or it is another format: save the SAE again."
            )
        if not tensor.is_floating_point():
            raise Failure(
                f"{name} in {path} is made of {tensor.dtype} where real numbers were wanted; "
                "quantised SAEs are not read: save it in float32."
            )
        found[name] = tensor.detach().float()
        if not bool(torch.isfinite(found[name]).all()):
            raise Failure(
                f"{name} in {path} holds NaN or infinite numbers; the SAE was saved after its "
                "training broke: take an earlier checkpoint."
            )
    return found


def whole(path: Path, name: str, value: Any, least: int = 1) -> int:
    """A whole number of a description or a scalar tensor. Raises `Failure` for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    is_whole = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_whole or value != int(value) or value < least:
        raise Failure(
            f"{path} says {name} = {value!r} where a whole number from {least} on was wanted; save "
            "the SAE again."
        )
    return int(value)


def plain(value: Any) -> Any:
    """What of a value our files can say; numbers that are none, and all else, as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, str | int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def only_known(path: Path, found: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raises `UserError` for keys nobody has taught us: they may change what the SAE computes."""
    unknown = sorted(set(found) - known)
    if unknown:
        raise UserError(
            f"{path} has {what} that this version does not know ({', '.join(unknown)}) and that "
            "may change what the SAE computes; remove them where they do not, or ask for support."
        )


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def save_pickle(path: Path, content: Mapping[str, Any] | Tensor) -> None:
    """Write a file of `torch.save`, whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` on success and is removed on error.

    Raises `UserError` where `folder` is there already and holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name another with --out, or remove it first.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _line(error: Exception) -> str:
    """The first line of an error, short."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")

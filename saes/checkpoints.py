"""Checkpoints of a training run: tensors as safetensors, numbers as JSON, never a pickle.

    checkpoints/step-000500/state.safetensors    every tensor of the state
    checkpoints/step-000500/state.json           schema, step, parts and other numbers

A checkpoint is written beside its place and renamed into it, so a folder called `step-...` is
whole. The last two are kept: should the newest be damaged after all, the one before it serves.

Where the latents are spread over ranks, each writes its own part, `state-0-of-8.safetensors`, ...
Every tensor has an entry or a row for each latent, but for those that `is_whole` names, which all
parts hold alike. Reading takes any stretch of latents from any number of parts, so a run may go on
with another number of ranks.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probe.errors import Failure
from probe.ranks import ALONE, Ranks
from probe.runs import read_json, write_json

logger = logging.getLogger(__name__)

SCHEMA = 1
KEPT = 2
FOLDER, NUMBERS = "checkpoints", "state.json"


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
    ranks: Ranks = ALONE,
) -> None:
    """Write the checkpoint of `step`, then delete all but the newest `KEPT`.

    `ranks` are those that hold a part of the latents each; all of them call this.
    """
    folder = run_dir / FOLDER
    path = folder / f"step-{step:06d}"
    temporary = folder / f".{path.name}.tmp"
    if ranks.is_first:
        for leftover in folder.glob(".step-*.tmp"):  # of a run killed while it wrote one
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    ranks.wait()
    part = temporary / tensors_name(ranks.rank, ranks.size)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
    with part.open("rb") as written:
        os.fsync(written.fileno())
    ranks.wait()
    if ranks.is_first:
        known = {"schema": SCHEMA, "step": step, "parts": ranks.size}
        write_json(temporary / NUMBERS, known | numbers)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        for old in checkpoint_paths(run_dir)[:-KEPT]:
            shutil.rmtree(old)
    ranks.wait()


def tensors_name(part: int, n_parts: int) -> str:
    """Name of the file that holds a part of the state."""
    return "state.safetensors" if n_parts == 1 else f"state-{part}-of-{n_parts}.safetensors"


def is_whole(name: str) -> bool:
    """Whether a tensor belongs to no latent: the decoder's bias, counters, the generator."""
    return name.endswith(".b_dec") or name.startswith("step.") or name == "generator"


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """The checkpoints there are, oldest first."""
    return sorted((run_dir / FOLDER).glob("step-*"), key=lambda path: int(path.name[5:]))


def load_checkpoint(
    run_dir: Path,
    *,
    latents: range | None = None,
    wanted: Callable[[str], bool] = lambda _: True,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and numbers of the newest checkpoint that is sound for every rank; None for none.

    Args:
        run_dir: the run's folder.
        latents: the latents to read; None for all.
        wanted: which tensors to read, by name.
        ranks: the processes that read; each calls this and gets the same step.

    Raises:
        Failure: there are some and none is sound.
    """
    paths = checkpoint_paths(run_dir)
    for path in reversed(paths):
        found = _read(path, latents, wanted)
        if ranks.all_say(found is not None):
            return found
    if paths:
        raise Failure(
            f"no checkpoint in {run_dir / FOLDER} can be read; delete {run_dir} and train again."
        )
    return None


def _read(
    path: Path, latents: range | None, wanted: Callable[[str], bool]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What a checkpoint holds; None, and a warning, where it is damaged."""
    try:
        numbers = read_json(path / NUMBERS)
        if numbers.get("schema") != SCHEMA:
            raise Failure(f"{path} has schema {numbers.get('schema')!r}, not {SCHEMA}.")
        n_parts = numbers.get("parts", 1)
        files = [safe_open(path / tensors_name(i, n_parts), "pt") for i in range(n_parts)]
        names = [name for name in files[0].keys() if wanted(name)]  # noqa: SIM118 (not a dict)
        return {name: _stretch(files, name, latents) for name in names}, numbers
    except (Failure, SafetensorError, OSError) as error:
        logger.warning("%s is not usable (%s); trying the one before it.", path, error)
        return None


def _stretch(files: list[Any], name: str, latents: range | None) -> Tensor:
    """The rows of some latents, of which every file holds a stretch in turn."""
    if is_whole(name) or (latents is None and len(files) == 1):
        return files[0].get_tensor(name)
    rows, first = [], 0
    for file in files:
        part = file.get_slice(name)
        n = part.get_shape()[0]
        start, stop = (0, n) if latents is None else (latents.start - first, latents.stop - first)
        if max(start, 0) < min(stop, n):
            rows.append(part[max(start, 0) : min(stop, n)])
        first += n
    return torch.cat(rows)

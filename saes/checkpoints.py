"""Checkpoints of a training run: tensors as safetensors, numbers as JSON, never a pickle.

    checkpoints/step-000500/state.safetensors    every tensor of the state
    checkpoints/step-000500/state.json           schema, step and other numbers

A checkpoint is written beside its place and renamed into it, so a folder called `step-...` is
whole. The last two are kept: should the newest be damaged after all, the one before it serves.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probe.errors import Failure
from probe.runs import read_json, write_json

logger = logging.getLogger(__name__)

SCHEMA = 1
KEPT = 2
FOLDER, TENSORS, NUMBERS = "checkpoints", "state.safetensors", "state.json"


def save_checkpoint(
    run_dir: Path, step: int, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Write the checkpoint of `step`, then delete all but the newest `KEPT`."""
    folder = run_dir / FOLDER
    path = folder / f"step-{step:06d}"
    temporary = folder / f".{path.name}.tmp"
    for leftover in folder.glob(".step-*.tmp"):  # of a run killed while it wrote one
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS
    )
    with (temporary / TENSORS).open("rb") as written:
        os.fsync(written.fileno())
    write_json(temporary / NUMBERS, {"schema": SCHEMA, "step": step, **numbers})
    shutil.rmtree(path, ignore_errors=True)
    temporary.replace(path)
    for old in checkpoint_paths(run_dir)[:-KEPT]:
        shutil.rmtree(old)


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """The checkpoints there are, oldest first."""
    return sorted((run_dir / FOLDER).glob("step-*"), key=lambda path: int(path.name[5:]))


def load_checkpoint(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and numbers of the newest sound checkpoint; None where there is no checkpoint.

    Raises `Failure` where there are some and none is sound.
    """
    paths = checkpoint_paths(run_dir)
    for path in reversed(paths):
        try:
            numbers = read_json(path / NUMBERS)
            if numbers.get("schema") != SCHEMA:
                raise Failure(f"{path} has schema {numbers.get('schema')!r}, not {SCHEMA}.")
            return load_file(path / TENSORS), numbers
        except (Failure, SafetensorError, OSError) as error:
            logger.warning("%s is not usable (%s); trying the one before it.", path, error)
    if paths:
        raise Failure(
            f"no checkpoint in {run_dir / FOLDER} can be read; delete {run_dir} and train again."
        )
    return None

"""What a recipe of images does, as a run folder of PNG files (kind `drawing`).

NNN-<prompt>-seed<seed>/before.png    the model's own image
                        after.png     with the recipe's edits
                        both.png      side by side
moved.json                            how far each image moved, inside and outside the mask
"""

import io
import math
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from probe.models import model_name, weights_checksum
from probe.runs import Run, atomic_path, read_json, write_json
from saes.drawing import Drawing, Drawn
from saes.recipes import to_json

KIND, SCHEMA, MOVED = "drawing", 1, "moved.json"
GAP = 4
"""White pixels between two images side by side."""


def drawing_run(
    drawing: Drawing,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    *,
    times: float,
    at_once: int,
    root: Path,
) -> Run:
    """The folder of a recipe's images, drawn where it is not complete already.

    Raises as `Drawing.compare` does.
    """
    model, recipe = drawing.model, drawing.recipe
    asked = {
        "kind": KIND,
        "schema": SCHEMA,
        "recipe": to_json(recipe),
        "weights": weights_checksum(model.spec) if Path(model.spec).is_dir() else None,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "prompts": list(prompts),
        "seeds": list(seeds),
        "times": times,
        "at_once": at_once,
    }
    run = Run.create(root / "drawings", slug(recipe.name) or model_name(model.spec), asked)
    with run.lock():
        if not run.complete:
            drawn = drawing.compare(prompts, seeds, times=times, at_once=at_once)
            rows = _write(run, drawn)
            mean = sum(row["whole"] for row in rows) / len(rows)
            run.finish(
                summary={"n_images": len(rows), "moved": mean},
                inputs={key: sae.weights for key, sae in recipe.saes.items()},
                seeds={f"image {i}": row["seed"] for i, row in enumerate(rows)},
                device=model.device.type,
            )
    return run


def moved_rows(run: Run) -> list[dict[str, Any]]:
    """How far each image of a folder moved: `prompt, seed, whole, inside, outside, folder`."""
    return read_json(run.path / MOVED)


def _write(run: Run, drawn: Drawn) -> list[dict[str, Any]]:
    rows = []
    for i, row in enumerate(drawn.moved().to_dict("records")):
        folder = run.path / f"{i:03d}-{slug(row['prompt']) or 'nothing'}-seed{row['seed']}"
        before, after = drawn.before[i], drawn.after[i]
        pictures = {"before": before, "after": after, "both": side_by_side(before, after)}
        for name, picture in pictures.items():
            with atomic_path(folder / f"{name}.png") as temporary:
                temporary.write_bytes(png(picture))
        known = {k: None if v != v else v for k, v in row.items()}
        rows.append(known | {"folder": folder.name})
    write_json(run.path / MOVED, rows)
    return rows


def slug(text: str) -> str:
    """A text as part of a file's name: its first letters and digits, in lower case."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")


def side_by_side(*pictures: UInt8[Tensor, "h _w 3"]) -> UInt8[Tensor, "h W 3"]:
    """Pictures of one height in a row, with a white gap between."""
    gap = torch.full((pictures[0].shape[0], GAP, 3), 255, dtype=torch.uint8)
    row = [part for picture in pictures for part in (gap, picture)][1:]
    return torch.cat(row, 1)


def png(picture: UInt8[Tensor, "h w 3"], *, pixels: int | None = None) -> bytes:
    """A picture as the bytes of a PNG file.

    Args:
        picture: red, green and blue.
        pixels: the longest side to shrink it to; None to keep its size. Never enlarged.
    """
    from PIL import Image

    image, file = Image.fromarray(picture.numpy()), io.BytesIO()
    longest = max(picture.shape[:2])
    if pixels is not None and longest > pixels:
        size = [max(1, math.ceil(side * pixels / longest)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BOX)
    image.save(file, format="PNG")
    return file.getvalue()

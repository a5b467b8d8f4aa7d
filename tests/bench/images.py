"""Images: a store that is captured while they are drawn, against drawing them alone."""

import itertools
import tempfile
from pathlib import Path

import pandas as pd
import torch

from probe.diffusion import DiffusionModel, DrawConfig
from probe.errors import UserError
from probe.models import load_image_model
from probe.passes import common_grid
from probe.runs import Run
from probe.sites import parse_site
from probe.store_config import ImageStoreConfig
from probe.store_writing import write_store
from probe.toyturbo.briefs import captions
from probe.toyturbo.parts import (
    make_pipeline,
    make_text_encoders,
    make_tokenizer,
    make_unet,
    make_vae,
)
from tests.bench.timing import side_by_side
from tests.true_size import true_size_sdxl

SITES = ("down.2.1", "mid.0", "up.0.0", "up.0.1")
IMAGES, AT_ONCE = 64, 8


def measure() -> pd.DataFrame:
    """Images a second of toy-turbo and, where there is a GPU, of SDXL-Turbo's true size."""
    tables = [measured("toy-turbo", toy_turbo(), IMAGES, AT_ONCE)]
    if torch.cuda.is_available():
        tables.append(measured("true size", true_size_sdxl(device="cuda"), IMAGES, AT_ONCE))
    return pd.concat(tables, ignore_index=True)


def toy_turbo() -> DiffusionModel:
    """The model itself or, where it has not been made, its parts untrained, which are as fast."""
    try:
        return load_image_model("toy-turbo", dtype="float32")
    except UserError:
        tokenizer = make_tokenizer()
        encoders = make_text_encoders(tokenizer)
        pipeline = make_pipeline(tokenizer, encoders, make_vae(), make_unet())
        return DiffusionModel("toy-turbo, untrained", pipeline)


def measured(name: str, model: DiffusionModel, images: int, at_once: int) -> pd.DataFrame:
    """Drawing alone, and with all of the four blocks' updates kept, with and without pictures."""
    prompts = list(itertools.islice(captions(0), images))
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def plain(size: int = at_once) -> None:
            for start in range(0, images, size):
                some = prompts[start : start + size]
                model.generate(some, range(start, start + len(some)))

        def capture(keep_images: int | None) -> None:
            config = store_config(model, images, at_once, keep_images)
            parent = Path(folder) / str(next(numbers))
            write_store(Run.create(parent, "bench", config.run_config()), model, progress=False)

        ways = {
            f"{name}: drawing, {at_once} at once": plain,
            f"{name}: capture of 4 sites, pictures kept": lambda: capture(None),
            f"{name}: capture of 4 sites alone": lambda: capture(0),
            f"{name}: drawing, 1 at once": lambda: plain(1),
        }
        return side_by_side(ways, images, "images", rounds=3)


def store_config(
    model: DiffusionModel, images: int, at_once: int, keep_images: int | None
) -> ImageStoreConfig:
    """The four blocks' updates at every place, in one step."""
    height, width = model.image_size(DrawConfig())
    return ImageStoreConfig(
        model={"spec": model.spec, "random_weights": None, "dtype": "bfloat16"},
        prompts="builtin",
        sites=SITES,
        grid=common_grid(model, list(map(parse_site, SITES)), DrawConfig()),
        height=height,
        width=width,
        images=images,
        batch_images=at_once,
        keep_images=keep_images,
    )

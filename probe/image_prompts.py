"""Prompts to draw, and their passes in batches.

Prompts are named by

    builtin                      captions of toy-turbo's world, without end (`probe.toyturbo`)
    PATH.txt                     one prompt a line
    PATH.jsonl, PATH.jsonl.gz    one a line: {"text": ..., "id": ... (optional)}
    PATH.parquet                 one a row: columns `text` and, optionally, `id`
    org/name, org/name:config    a Hugging Face dataset, streamed: split `train`, column `text`

Image number i draws prompt number i from seed `seed + i`, so any image can be drawn again alone.
Which places of a pass are kept is drawn from the seed, the image's number and the step's.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probe.corpora import BUILTIN, Document, read_documents
from probe.diffusion import DiffusionModel, Generated
from probe.errors import UserError
from probe.passes import read_passes
from probe.runs import sha256_file
from probe.sites import Site
from probe.store_config import ImageStoreConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBatch:
    """The passes of some images that are drawn together: image by image, step by step."""

    tokens: Int[Tensor, "b t"]
    """Number of each place, int64."""
    doc: Int[Tensor, "b t"]
    """Number of the prompt, int32."""
    keep: Bool[Tensor, "b t"]
    """Whether the place is kept."""
    first_sequence: int
    """Number of the first pass."""
    prompts: tuple[str, ...]
    """What is drawn, an image each."""
    first_image: int
    """Number of the first image."""
    config: ImageStoreConfig
    """How, and what of it is kept."""

    @property
    def images(self) -> Int[Tensor, " n"]:
        """Numbers of the images."""
        return torch.arange(self.first_image, self.first_image + len(self.prompts))

    @property
    def seeds(self) -> list[int]:
        """The images' seeds."""
        return [self.config.seed + image for image in self.images.tolist()]

    def columns(self) -> dict[str, Tensor]:
        """Where in images each kept place is, besides what every batch says: a value a row."""
        sequence, place = self.keep.nonzero(as_tuple=True)
        row = sequence % len(self.config.passes_of_step)
        found = {
            "image": (self.first_image + sequence // self.config.passes_of_image).int(),
            "step": (sequence // len(self.config.passes_of_step) % self.config.steps).short(),
            "y": (place // self.config.grid[1]).short(),
            "x": (place % self.config.grid[1]).short(),
        }
        return found | ({"conditional": row == 1} if self.config.rows == "both" else {})

    def named(self, sequence: int, place: int) -> str:
        """A place in words, for messages."""
        image, pass_number = divmod(sequence, self.config.passes_of_image)
        step, row = divmod(pass_number, len(self.config.passes_of_step))
        y, x = divmod(place, self.config.grid[1])
        return (
            f"image {self.first_image + image} (prompt {self.prompts[image]!r}), step {step}, "
            f"{self.config.passes_of_step[row]} row, y {y}, x {x}"
        )

    def run(
        self, model: DiffusionModel, sites: list[Site], *, draw: bool
    ) -> tuple[dict[Site, Float[Tensor, "b t d"]], Generated | None]:
        """Draw the images and read the sites at every step; as `probe.passes.read_passes`."""
        found = read_passes(
            model,
            self.prompts,
            self.seeds,
            self.config.draw,
            sites,
            rows=self.config.rows,
            draw=draw,
        )
        rows = len(self.config.passes_of_step)
        values = {
            # [step, row and image, ...] -> [image, step, row, ...]
            site: x.unflatten(1, (rows, -1)).movedim(2, 0).flatten(0, 2)
            for site, x in found.values.items()
        }
        return values, found.drawn


def pass_batches(config: ImageStoreConfig, start_sequence: int = 0) -> Iterator[PassBatch]:
    """The passes of a store, in batches of images.

    Args:
        config: the store's.
        start_sequence: leave out the passes before this one, which is the first of an image.

    Raises:
        UserError: there are no such prompts, or none.
        Failure: their file is damaged.
    """
    image, rest = divmod(start_sequence, config.passes_of_image)
    assert rest == 0, "batches hold whole images"
    prompts = read_prompts(config.prompts, config.seed)
    wanted = itertools.islice((prompt.text for prompt in prompts), image, config.images)
    while texts := tuple(itertools.islice(wanted, config.batch_images)):
        numbers = torch.arange(image, image + len(texts), dtype=torch.int32)
        doc = numbers.repeat_interleave(config.passes_of_image)[:, None].expand(-1, config.context)
        yield PassBatch(
            tokens=torch.arange(config.context).expand(len(doc), -1),
            doc=doc,
            keep=torch.cat([_kept_places(config, number) for number in numbers.tolist()]),
            first_sequence=image * config.passes_of_image,
            prompts=texts,
            first_image=image,
            config=config,
        )
        image += len(texts)


def read_prompts(source: str, seed: int) -> Iterator[Document]:
    """The prompts of a source, one after another; blank ones are left out.

    Args:
        source: as in the module's docstring.
        seed: decides the built-in ones.

    Raises:
        UserError: there is no such source, or it has no prompt.
        Failure: its file is damaged.
    """
    if source == BUILTIN:
        from probe.toyturbo.briefs import captions

        texts = enumerate(captions(seed))
        return (Document(id=f"{BUILTIN}:{number}", text=text) for number, text in texts)
    path = Path(source)
    if not (path.is_file() and path.name.endswith(".txt")):
        return read_documents(source)
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} has no prompt in it; write one on each line.")
    return itertools.chain([first], lines)


def prompts_checksum(source: str) -> str | None:
    """SHA-256 of the file that prompts are read from; None for others."""
    return sha256_file(Path(source)) if Path(source).is_file() else None


def _lines(path: Path) -> Iterator[Document]:
    try:
        with path.open() as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Document(id=f"{path.name}:{number}", text=line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error


def _kept_places(config: ImageStoreConfig, image: int) -> Bool[Tensor, "s t"]:
    """Which places are kept of an image's passes; the same of both rows of guidance."""
    keep = torch.ones(config.steps, config.context, dtype=torch.bool)
    if config.places not in (0, config.context):
        keep[:] = False
        for step in range(config.steps):
            generator = np.random.default_rng([config.seed, image, step])
            chosen = generator.choice(config.context, config.places, replace=False)
            keep[step, torch.from_numpy(chosen)] = True
    return keep.repeat_interleave(len(config.passes_of_step), dim=0)

"""The images that probes and scores look at: drawn once, with what the SAEs say of every place.

A part's folder holds, for each block, `codes-<block>.safetensors` (the SAE's values and indices at
every place [n, t, k], and the update's mean over the places of each quarter of the image [n, 4, d])
and `images-00000.parquet` (`probe.pictures`). On toy-turbo the quarters are the world's cells.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from analyses.block_roles_cells import described, kept_run
from analyses.block_roles_drawing import Asked, Ticks, chunks, draw_and_read
from analyses.block_roles_measured import ONE_STEP, Config, Settings, Subject
from probe.image_prompts import read_prompts
from probe.passes import common_grid
from probe.pictures import Picture, decode, encode, write_pictures
from probe.runs import atomic_path
from probe.toyturbo.briefs import describe, draw_briefs, settle
from probe.toyturbo.evaluation import first_noise
from probe.toyturbo.fitting import seeded
from probe.toyturbo.world import Scenes
from saes.models import SparseAutoencoder

PART = "images"
FIRST_SEED = 5_000_000
"""Seeds of this study's noise begin here, beyond those that SAEs are trained on."""
QUARTERS = 4
PICTURES = "images-00000.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCodes:
    """What the SAE of a block says of some images."""

    values: Float[Tensor, "n t k"]
    """Activations, strongest first."""
    indices: Int[Tensor, "n t k"]
    """Their features."""
    updates: Float[Tensor, "n 4 d"]
    """The update's mean over the places of each quarter."""
    grid: tuple[int, int]
    """Height and width of the feature map."""
    d_sae: int
    """Number of features."""

    def heat_map(self, feature: int, images: Int[Tensor, " m"]) -> Float[Tensor, "m h w"]:
        """A feature's activation at every place of some images."""
        chosen = self.values[images] * (self.indices[images] == feature)
        return chosen.sum(-1).unflatten(1, self.grid)

    def by_quarter(self) -> Float[Tensor, "n 4 s"]:
        """Every feature's mean over the places of each quarter."""
        n, t, _ = self.values.shape
        quarter = quarter_of(self.grid)[None, :, None].expand_as(self.values)
        row = torch.arange(n)[:, None, None].expand_as(self.values)
        sums = torch.zeros(n, QUARTERS, self.d_sae)
        sums.index_put_((row, quarter, self.indices.long()), self.values, accumulate=True)
        return sums / (t // QUARTERS)

    def largest(self) -> Float[Tensor, "n s"]:
        """Every feature's largest activation in each image."""
        flat = torch.zeros(len(self.values), self.d_sae)
        return flat.scatter_reduce(
            1, self.indices.flatten(1).long(), self.values.flatten(1), "amax", include_self=True
        )

    def means(self) -> Float[Tensor, " s"]:
        """Every feature's mean activation over the places where it fires; 0 where it never does."""
        fires = self.values != 0
        latents, found = self.indices[fires].long(), self.values[fires].double()
        total = torch.zeros(self.d_sae, dtype=torch.float64).index_add_(0, latents, found)
        count = torch.bincount(latents, minlength=self.d_sae)
        return (total / count.clamp_min(1)).float()

    def living(self) -> Int[Tensor, " m"]:
        """The features that fire at all."""
        return (self.means() != 0).nonzero().squeeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """The images, and all that is known of them."""

    asked: Asked
    """What was drawn."""
    truth: Scenes | None
    """The scenes that the captions and noises mean; None where that is not known."""
    codes: Mapping[str, BlockCodes]
    """By block."""
    pictures: Sequence[bytes]
    """The images as they are kept: to the bit where they are small."""

    def __len__(self) -> int:
        return len(self.asked)

    def images(self, numbers: Int[Tensor, " m"]) -> UInt8[Tensor, "m h w 3"]:
        """Some of the images."""
        return torch.stack([decode(self.pictures[n]) for n in numbers.tolist()])


def quarter_of(grid: tuple[int, int]) -> Int[Tensor, " t"]:
    """The quarter of the image that each place lies in: 0 top left, 1 top right, 2, 3."""
    h, w = grid
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (2 * (y >= h // 2) + (x >= w // 2)).flatten().long()


def by_quarter(x: Float[Tensor, "n t d"], grid: tuple[int, int]) -> Float[Tensor, "n 4 d"]:
    """The mean over the places of each quarter, which are equally many."""
    quarter = quarter_of(grid)
    return torch.stack([x[:, quarter == q].mean(1) for q in range(QUARTERS)], dim=1)


def questions(config: Config, n: int, *, known: bool) -> tuple[Asked, Scenes | None]:
    """Prompts and seeds, and the scenes that they mean where that is known.

    Raises `UserError` where there are no such prompts.
    """
    seeds = tuple(range(FIRST_SEED + config.seed * 10_000, FIRST_SEED + config.seed * 10_000 + n))
    if not known:
        texts = (prompt.text for prompt in read_prompts(config.prompts, FIRST_SEED + config.seed))
        prompts = tuple(itertools.islice(texts, n))
        return Asked(prompts=prompts, seeds=seeds[: len(prompts)]), None
    brief = draw_briefs(n, seeded(FIRST_SEED, config.seed))
    asked = Asked(prompts=tuple(describe(brief)), seeds=seeds)
    return asked, settle(brief, first_noise(seeds))


def look(subject: Subject, config: Config, settings: Settings, root: Path, tick: Ticks) -> Looked:
    """Draw the images and read them, or find them drawn. Raises as `questions` does."""
    known = subject.reader is not None
    asked, truth = questions(config, settings.images, known=known)
    wanted = described(PART, subject) | {
        "images": len(asked), "seed": config.seed, "prompts": None if known else config.prompts,
    }  # fmt: skip
    folder = kept_run(root, wanted, lambda folder: _fill(folder, subject, asked, tick))
    return Looked(
        asked=asked,
        truth=truth,
        codes={block: _read_codes(folder, subject, block) for block in subject.blocks},
        pictures=pq.read_table(folder / PICTURES, columns=["data"])["data"].to_pylist(),
    )


def _fill(folder: Path, subject: Subject, asked: Asked, tick: Ticks) -> None:
    grid = common_grid(subject.model, subject.sites, ONE_STEP)
    parts: dict[str, list[dict[str, Tensor]]] = {block: [] for block in subject.blocks}
    pictures: list[Picture] = []
    for chunk in chunks(len(asked)):
        some = asked.part(range(chunk.start, chunk.stop))
        images, updates = draw_and_read(subject.model, some, subject.sites, tick=tick)
        for block, x in updates.items():
            parts[block].append(_read(subject.saes[block].sae, x, grid))
        pictures += [_picture(chunk.start + i, asked, one) for i, one in enumerate(images)]
    for block, found in parts.items():
        with atomic_path(folder / f"codes-{block}.safetensors") as temporary:
            save_file(joined_codes(found), temporary)
    write_pictures(folder / PICTURES, pictures)


@torch.no_grad()
def _read(
    sae: SparseAutoencoder, x: Float[Tensor, "b t d"], grid: tuple[int, int]
) -> dict[str, Tensor]:
    codes = sae.encode(x.to(sae.W_dec.device))
    return {
        "values": codes.values.cpu(),
        "indices": codes.indices.cpu().int(),
        "updates": by_quarter(x, grid),
    }


def joined_codes(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all batches; codes of fewer entries are filled up with none."""
    width = max(part["values"].shape[-1] for part in parts)
    wide = {
        name: [functional.pad(part[name], (0, width - part[name].shape[-1])) for part in parts]
        for name in ("values", "indices")
    }
    joined = wide | {"updates": [part["updates"] for part in parts]}
    return {name: torch.cat(found).contiguous() for name, found in joined.items()}


def _picture(number: int, asked: Asked, image: UInt8[Tensor, "h w 3"]) -> Picture:
    form, data = encode(image)
    return Picture(
        image=number, doc=number, seed=asked.seeds[number], prompt=asked.prompts[number],
        height=image.shape[0], width=image.shape[1], format=form, data=data,
    )  # fmt: skip


def _read_codes(folder: Path, subject: Subject, block: str) -> BlockCodes:
    return BlockCodes(
        **load_file(folder / f"codes-{block}.safetensors"),
        grid=common_grid(subject.model, subject.sites, ONE_STEP),
        d_sae=subject.saes[block].sae.config.d_sae,
    )

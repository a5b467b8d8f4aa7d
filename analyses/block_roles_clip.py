"""Scores by an image-text model of the user's choice, for images whose factors nobody knows.

With the CLIPModel given (Radford et al. 2021, arXiv 2103.00020), all similarities cosines of its
embeddings, the features and images those of `analyses.block_roles_scores`:

- likeness: mean similarity between two top images; control: two images drawn by lot.
- word `texture`: mean similarity of the top images to the word; control: images by lot.
- causality: the feature's icon (the empty prompt, the block's update replaced everywhere by
  k mean f, k the mean number of features active at a place) against the prompts of its top images,
  which stand for a caption; control: the prompts of images by lot.

Rows like those of the table `scores`.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from analyses.block_roles_cells import described, kept
from analyses.block_roles_drawing import BATCH, Asked, Change, Ticks, draw
from analyses.block_roles_images import BlockCodes, Looked
from analyses.block_roles_measured import Config, Settings, Subject, Tables
from analyses.block_roles_scores import (
    STREAM,
    pair_mean,
    random_images,
    scored_features,
    top_images,
)
from probe.errors import UserError
from probe.toyturbo.fitting import seeded

PART, WORD, ICON_SEED = "clip-scores", "texture", 42


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageText:
    """An image-text model."""

    spec: str
    """The folder or hub id that it was asked for by."""
    model: Any
    """A `CLIPModel`."""
    processor: Any
    """Its `CLIPProcessor`."""

    @torch.no_grad()
    def images(self, images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b e"]:
        """Embeddings of images, of length 1."""
        parts = []
        for some in images.split(BATCH):
            given = self.processor.image_processor(list(some.numpy()), return_tensors="pt")
            parts.append(self.model.get_image_features(**given).pooler_output)
        return functional.normalize(torch.cat(parts).float(), dim=1)

    @torch.no_grad()
    def texts(self, texts: tuple[str, ...]) -> Float[Tensor, "b e"]:
        """Embeddings of texts, of length 1; what the model cannot read of a text is left out."""
        given = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return functional.normalize(
            self.model.get_text_features(**given).pooler_output.float(), dim=1
        )


def load_image_text(spec: str) -> ImageText:
    """A CLIPModel, of local files where they are there.

    Raises `UserError` where the folder or hub id holds none.
    """
    from transformers import CLIPModel, CLIPProcessor

    for local in (True, False):
        if not local and Path(spec).exists():
            break
        with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
            model = CLIPModel.from_pretrained(spec, local_files_only=local)
            processor = CLIPProcessor.from_pretrained(spec, local_files_only=local)
            return ImageText(spec=spec, model=model.eval(), processor=processor)
    raise UserError(
        f"{spec} is no image-text model: wanted a folder or hub id with a CLIPModel and its "
        "processor, such as openai/clip-vit-base-patch32."
    )


def clip_scores(
    subject: Subject, block: str, looked: Looked, judge: ImageText, config: Config,
    settings: Settings, root: Path, tick: Ticks,
) -> Tables:  # fmt: skip
    """Rows for the table `scores` of a block, or those kept."""
    asked = described(PART, subject, block) | {
        "images": len(looked), "seed": config.seed, "scored": settings.scored,
        "top": settings.top, "clip": judge.spec,
        "prompts": None if looked.truth else config.prompts,
    }  # fmt: skip
    found = kept(
        root, asked,
        lambda: measure_clip(subject, block, looked, judge, settings, config.seed, tick),
    )  # fmt: skip
    found["scores"].insert(0, "block", block)
    found["scores"].insert(0, "weights", subject.weights)
    return found


def measure_clip(
    subject: Subject,
    block: str,
    looked: Looked,
    judge: ImageText,
    settings: Settings,
    seed: int,
    tick: Ticks,
) -> Tables:
    """Score the same features as `analyses.block_roles_scores` does."""
    codes, generator = looked.codes[block], seeded(seed, STREAM, *map(ord, block))
    features = scored_features(codes, settings, generator)
    if not features:
        return {"scores": pd.DataFrame(columns=["feature", "score", "value", "random"])}
    icons = judge.images(draw_icons(subject, block, codes, features, tick))
    word = judge.texts((WORD,))[0]
    rows = []
    for feature, icon in zip(features, icons, strict=True):
        sets = (
            top_images(codes, feature, settings.top),
            random_images(codes, settings.top, generator),
        )
        seen = [judge.images(looked.images(one.images)) for one in sets]
        said = [judge.texts(looked.asked.part(one.images.tolist()).prompts) for one in sets]
        pairs = {
            "likeness by CLIP": [pair_mean(x @ x.T) for x in seen],
            f"likeness to the word {WORD}": [float((x @ word).mean()) for x in seen],
            "icon and captions by CLIP": [float((x @ icon).mean()) for x in said],
        }
        rows += [
            {"feature": feature, "score": name, "value": own, "random": other}
            for name, (own, other) in pairs.items()
        ]
    return {"scores": pd.DataFrame(rows, columns=["feature", "score", "value", "random"])}


def draw_icons(
    subject: Subject, block: str, codes: BlockCodes, features: list[int], tick: Ticks
) -> UInt8[Tensor, "b h w 3"]:
    """What features stand for alone: the empty prompt, the update k mean f everywhere."""
    active = float((codes.values != 0).double().sum(-1).mean())
    directions = subject.saes[block].sae.W_dec.detach().cpu()[features]
    value = (active * codes.means()[features])[:, None, None] * directions[:, None]
    n, t = len(features), codes.values.shape[1]
    asked = Asked(prompts=("",) * n, seeds=(ICON_SEED,) * n)
    change = Change(block=block, op="set", value=value.expand(-1, t, -1))
    return draw(subject.model, asked, [change], tick=tick)

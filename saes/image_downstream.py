"""What a reconstruction does to the images: it takes the update's place while they are drawn.

Images of the store that training left out are drawn again, from their prompts and seeds: as they
are, and with every candidate's reconstruction in the activation's place, at each denoising step, at
all places and in those rows of guidance that the store holds. There is no next word to predict, so
what is measured is how far the result moves: the pixels, and the latents that they are decoded
from. Ablation, zero or the mean row at every place, is the scale: 0 is as far as the ablated image,
1 is the image itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm import tqdm

from probe.diffusion import DiffusionModel, Generated, Rows
from probe.errors import Failure, UserError
from probe.interventions import editing
from probe.passes import read_passes
from probe.sites import Site
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from saes.baselines import Candidate, Reconstruct
from saes.downstream import ADVICE, TOLERANCE
from saes.metrics import interval, ratios, resampling_weights
from saes.split import Span, spread

INTERVALS = (
    "pixel", "latent", "pixel_recovered", "pixel_recovered_mean", "latent_recovered",
    "latent_recovered_mean",
)  # fmt: skip
DEFINITIONS = {
    "pixel": "mean over channels and pixels of |image' - image| in levels of 0 to 255, image' "
    "being drawn with xhat in x's place at the site, at every step and place, from the same prompt "
    "and seed; mean over images",
    "latent": "mean over its numbers of (latent' - latent)^2, of the latents that the images are "
    "decoded from; mean over images",
    "pixel_zero, latent_zero": "the same with zero put in x's place",
    "pixel_mean, latent_mean": "the same with the store's mean row put in x's place",
    "pixel_recovered, latent_recovered": "1 - pixel / pixel_zero and 1 - latent / latent_zero; 1 "
    "is the untouched image, 0 is zero ablation",
    "pixel_recovered_mean, latent_recovered_mean": "the same with mean ablation as 0",
    "low, high": "ends of the 95 % percentile bootstrap interval over whole sequences (fidelity) "
    "or images (the others); it speaks of the choice of images, not of the training seed",
    "rows": "rows of whole images from the store's end, which training leaves out",
}
"""What differs from `saes.metrics.DEFINITIONS`, or is not there."""
TEXT_ONLY = ("ce", "ce_clean", "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")
"""What is not measured of images: they have no next token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far a candidate's images are from the untouched ones, an entry an image."""

    pixel: Float64[Tensor, " n"]
    """Mean |image' - image|, of 255."""
    latent: Float64[Tensor, " n"]
    """Mean (latent' - latent)^2."""


def held_out_images(config: ImageStoreConfig, spans: Sequence[Span], n_places: int) -> list[int]:
    """Images of which all passes are among the spans, evenly spaced, `n_places` places in all."""
    passes: dict[int, int] = {}
    for span in spans:
        image = span.sequence // config.passes_of_image
        passes[image] = passes.get(image, 0) + 1
    whole = [image for image, n in passes.items() if n == config.passes_of_image]
    return spread(whole, max(1, n_places // (config.context * config.passes_of_image)))


@torch.no_grad()
def measure_images(
    model: DiffusionModel,
    store: ActivationStore,
    site: Site,
    candidates: Sequence[Candidate],
    images: Sequence[int],
    *,
    batch: int,
    progress: bool = False,
) -> dict[str, Moved]:
    """Draw some of a store's images with every candidate spliced in; gives how far they moved.

    Args:
        model: the model that drew the store's images.
        store: a store of images.
        site: where the candidates' reconstructions go.
        candidates: what to splice in; names must differ.
        images: numbers of images.
        batch: images drawn together.
        progress: show a bar on stderr.

    Raises `Failure` where latents are not finite.
    """
    config = store.config
    assert isinstance(config, ImageStoreConfig), "the store is of images"
    prompts = store.prompts()
    found: dict[str, list[Moved]] = {candidate.name: [] for candidate in candidates}
    for start in tqdm(range(0, len(images), batch), desc="drawn again", disable=not progress):
        some = images[start : start + batch]
        texts, seeds = [prompts[i] for i in some], [config.seed + i for i in some]
        clean = model.generate(texts, seeds, config.draw)
        for candidate in candidates:
            change = splice(candidate.reconstruct, model, config.rows)
            with editing(model, site, change):
                drawn = model.generate(texts, seeds, config.draw)
            found[candidate.name].append(compare(clean, drawn, candidate.label))
    return {
        name: Moved(
            pixel=torch.cat([part.pixel for part in parts]),
            latent=torch.cat([part.latent for part in parts]),
        )
        for name, parts in found.items()
    }


def splice(
    reconstruct: Reconstruct, model: DiffusionModel, rows: Rows
) -> Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]:
    """A change that puts the reconstruction in the activation's place, in some rows of guidance."""

    def change(x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        new, chosen = x.clone(), model.rows(rows)
        flat = reconstruct(x[chosen].flatten(0, 1).float()).reconstruction
        new[chosen] = flat.unflatten(0, x[chosen].shape[:2]).to(x)
        return new

    return change


def compare(clean: Generated, drawn: Generated, label: str) -> Moved:
    """How far images are from the clean ones. Raises `Failure` where latents are not finite."""
    if not torch.isfinite(drawn.latents).all():
        raise Failure(
            f"the model gave NaN or infinite latents with {label} spliced in; run it in float32."
        )
    pixels = (drawn.images.double() - clean.images.double()).abs()
    latents = (drawn.latents.double() - clean.latents.double()).square()
    return Moved(pixel=pixels.mean((1, 2, 3)), latent=latents.mean((1, 2, 3)))


def image_rows(
    moved: Mapping[str, Moved], *, n_resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """The metrics of every candidate, with intervals; `zero` and `mean` are among them."""
    return {name: _row(one, moved, n_resamples, seed) for name, one in moved.items()}


def _row(one: Moved, moved: Mapping[str, Moved], n_resamples: int, seed: int) -> dict[str, float]:
    n = len(one.pixel)
    estimates = _metrics(one, moved, torch.ones(1, n, dtype=torch.float64))
    resamples = _metrics(one, moved, resampling_weights(n, n_resamples, seed))
    row = {name: float(value) for name, value in estimates.items()}
    for name in INTERVALS:
        row[f"{name}_low"], row[f"{name}_high"] = interval(resamples[name], n)
    return row


def _metrics(
    one: Moved, moved: Mapping[str, Moved], weights: Float64[Tensor, "r n"]
) -> dict[str, Float64[Tensor, " r"]]:
    """The metrics of every resample; a row of ones gives the estimate."""
    found, total = {}, weights.sum(1)
    for name in ("pixel", "latent"):
        value, zero, mean = (
            weights @ getattr(which, name) / total for which in (one, moved["zero"], moved["mean"])
        )
        found |= {
            name: value,
            f"{name}_zero": zero,
            f"{name}_mean": mean,
            f"{name}_recovered": ratios(zero - value, zero),
            f"{name}_recovered_mean": ratios(mean - value, mean),
        }
    return found


def check_image_model(
    model: DiffusionModel, store: ActivationStore, site: Site, spans: Sequence[Span], image: int
) -> None:
    """Raise `UserError` where the model does not give the activations that the store holds.

    Args:
        model: the model to check.
        store: the store.
        site: the site.
        spans: sequences of the store, all of the image's among them.
        image: one of its images, which is drawn to look.
    """
    config = store.config
    assert isinstance(config, ImageStoreConfig), "the store is of images"
    seen = read_passes(
        model, [store.prompts()[image]], [config.seed + image], config.draw, [site],
        rows=config.rows,
    ).values[site]  # fmt: skip
    drawn = seen.float().cpu().flatten(0, 1)
    own = [span for span in spans if span.sequence // config.passes_of_image == image]
    if drawn.shape[2] != store.d(site):
        raise UserError(
            f"{model.spec} has width {drawn.shape[2]} at {site} and the store has "
            f"{store.d(site)}; {ADVICE}"
        )
    wrong = total = 0.0
    for x, span in zip(drawn, own, strict=True):
        shard = store.shard(span.shard, site)
        stored = shard.values[span.start : span.stop].float()
        rows = x[shard.position[span.start : span.stop].long()]
        wrong += float((rows - stored).square().sum())
        total += float(stored.square().sum())
    # Written so that NaN fails too.
    if not (math.isfinite(wrong) and wrong <= TOLERANCE * total):
        raise UserError(
            f"{model.spec} gives other activations at {site} than the store holds; {ADVICE}"
        )

"""Where reconstructions are put into the running model, and what that does.

Of text the model reads held-out sequences (`saes.downstream`), of images it draws held-out ones
again (`saes.image_downstream`); either way the result is a few numbers for each candidate, beside
ablation. `saes.evaluation` asks for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from probe.diffusion import DiffusionModel
from probe.errors import UserError
from probe.language import LanguageModel
from probe.sites import Site
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from saes import image_downstream
from saes.baselines import Candidate
from saes.downstream import CLEAN, check_model, measure_downstream
from saes.image_downstream import check_image_model, held_out_images, image_rows, measure_images
from saes.metrics import (
    DEFINITIONS,
    Anchors,
    Downstream,
    downstream_metrics,
    interval,
    resampling_weights,
)
from saes.split import Span, read_rows, read_tokens, spread

INTERVALS = ("ce", "ce_recovered", "ce_recovered_mean", "kl")
"""Metrics of text that are given with an interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splices:
    """Where reconstructions are put into the running model."""

    spans: tuple[Span, ...]
    """Of text, the sequences; of images, all that are held out."""
    images: tuple[int, ...] | None
    """Of images, the numbers of those to draw again; None of text."""

    @staticmethod
    def of(store: ActivationStore, held_out: Sequence[Span], n: int) -> "Splices":
        """Sequences or images of about `n` tokens or places, evenly spaced among the held out."""
        if isinstance(store.config, ImageStoreConfig):
            images = held_out_images(store.config, held_out, n)
            return Splices(spans=tuple(held_out), images=tuple(images))
        spans = spread(held_out, max(1, n // store.config.context))
        return Splices(spans=tuple(spans), images=None)

    def check(
        self, model: LanguageModel | DiffusionModel, store: ActivationStore, site: Site
    ) -> None:
        """Raise `UserError` where the model is not the store's, or nothing can be measured."""
        if isinstance(model, LanguageModel):
            rows = read_rows(store, site, self.spans[0])
            check_model(model, site, read_tokens(store, self.spans[:1]), rows)
            return
        if not self.images:
            raise UserError(
                f"no whole image of {store.run.path} is held out, so none can be drawn again; "
                "capture more images, or measure without the model (--no-downstream)."
            )
        check_image_model(model, store, site, self.spans, self.images[0])

    def definitions(self) -> dict[str, str]:
        """What the metrics mean."""
        if self.images is None:
            return DEFINITIONS
        alike = {k: v for k, v in DEFINITIONS.items() if k not in image_downstream.TEXT_ONLY}
        return alike | image_downstream.DEFINITIONS

    def counts(self, store: ActivationStore, *, measured: bool) -> dict[str, int]:
        """How much the metrics rest on."""
        if self.images is not None:
            return {"n_images": len(self.images) if measured else 0}
        n = len(self.spans) if measured else 0
        return {"n_ce_tokens": n * store.config.context, "n_ce_sequences": n}

    def measure(
        self,
        model: LanguageModel | DiffusionModel,
        store: ActivationStore,
        site: Site,
        candidates: Sequence[Candidate],
        *,
        batch: int,
        n_resamples: int,
        seed: int,
        progress: bool,
    ) -> dict[str, dict[str, float]]:
        """The metrics of every candidate, by name; `zero` and `mean` are among them.

        Args:
            model: the store's.
            store: the store.
            site: where the reconstructions go.
            candidates: what to splice in.
            batch: sequences or images in a pass.
            n_resamples: behind each interval.
            seed: decides them.
            progress: show a bar on stderr.
        """
        if isinstance(model, DiffusionModel):
            moved = measure_images(
                model, store, site, candidates, self.images or (), batch=batch, progress=progress
            )
            return image_rows(moved, n_resamples=n_resamples, seed=seed)
        starts = range(0, len(self.spans), batch)
        batches = (
            read_tokens(store, self.spans[start : start + batch])
            for start in tqdm(starts, desc="downstream", disable=not progress)
        )
        sums = measure_downstream(model, site, candidates, batches)
        return {c.name: _text_row(sums[c.name], sums, n_resamples, seed) for c in candidates}


def _text_row(
    measured: Downstream, all_sums: Mapping[str, Downstream], n_resamples: int, seed: int
) -> dict[str, float]:
    anchors = Anchors(
        clean=all_sums[CLEAN].cross_entropy,
        zero=all_sums["zero"].cross_entropy,
        mean=all_sums["mean"].cross_entropy,
    )
    n = len(measured.n_predictions)
    everything = torch.ones(1, n, dtype=torch.float64)
    estimates = downstream_metrics(measured, anchors, everything)
    resamples = downstream_metrics(measured, anchors, resampling_weights(n, n_resamples, seed))
    row = {name: float(value) for name, value in estimates.items()}
    for name in INTERVALS:
        row[f"{name}_low"], row[f"{name}_high"] = interval(resamples[name], n)
    return row

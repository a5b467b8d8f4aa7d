"""How good an SAE is: against the rows it was not trained on, the model it explains, and controls.

1. Fidelity and sparsity on held-out rows of the store (`saes.split` says which). A few massive
   activations (Sun et al. 2024, arXiv 2402.17762) can outweigh all other rows in any sum of
   squares, so FVU and explained variance are given over typical rows too: a check on the store's
   own rule for leaving outliers out.
2. The same of two baselines of equal L0 fitted on training rows, and of the mean row
   (`saes.baselines`).
3. Downstream: each of them in the activation's place in the running model (`saes.downstream`, of
   images `saes.image_downstream`), measured against the clean model, zero ablation and mean
   ablation.
4. Optionally the random-weight twin: an SAE of the same recipe trained on the same architecture
   with random weights, measured on its own activations and model. What it also achieves says
   nothing about what the model learned (Heap et al. 2025, arXiv 2501.17727).
5. Over- and under-activation: the norm of each code against that of its input (`saes.afa`).

`saes.metrics` defines every number. The result is `metrics.json` in a run of kind "evaluation".
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm import tqdm

from probe.diffusion import DiffusionModel
from probe.errors import UserError
from probe.language import LanguageModel
from probe.runs import Run, read_json, sha256_file, write_json
from probe.sites import Site
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from saes import afa
from saes.baselines import (
    Candidate,
    constant_candidate,
    fit_principal_axes,
    pca_candidate,
    random_dictionary_candidate,
    sae_candidate,
)
from saes.metrics import (
    OUTLIER,
    FidelityMeter,
    interval,
    resampling_weights,
)
from saes.models import SparseAutoencoder
from saes.splicing import Splices
from saes.split import (
    Span,
    read_rows,
    sequence_spans,
    split_store,
    spread_rows,
)
from saes.types import Codes, SaeOutput

logger = logging.getLogger(__name__)

KIND, SCHEMA = "evaluation", 1
METRICS = "metrics.json"
ZF_POINTS = 1000
"""Rows that are kept for the ZF plot."""
N_SCALE_ROWS = 4096
"""Rows that the random dictionary's scale is fitted on."""
TWIN_NOTE = (
    "measured on its own model, whose weights are random: that model predicts nothing, so its "
    "ce, ce_recovered and kl say little; compare fvu, cosine and the shares."
)
IMAGE_TWIN_NOTE = (
    "measured on its own model, whose weights are random: that model draws nothing, so how far its "
    "images move says little; compare fvu, cosine and the shares."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """How much to measure."""

    held_out_share: float = 0.05
    """Share of the store's sequences, at its end, that training left out: only they are used."""
    n_rows: int = 65_536
    """Held-out rows to reconstruct, at most; whole sequences, evenly spaced."""
    n_ce_tokens: int = 32_768
    """Held-out tokens (of images: places) to run through the model for each candidate, at most;
    whole sequences, or images."""
    n_fit_rows: int = 131_072
    """Training rows that PCA is fitted on, at most."""
    batch_sequences: int = 8
    """Sequences, or images, in one forward pass: of text the logits are held in memory twice."""
    n_resamples: int = 1000
    """Bootstrap resamples behind an interval."""
    seed: int = 0
    """Decides the random dictionary and the resamples."""

    def __post_init__(self) -> None:
        for name in ("n_rows", "n_ce_tokens", "n_fit_rows", "batch_sequences", "n_resamples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def run_config(
        self, *, sae: str, store: str, site: Site, baselines: bool, twin: str | None
    ) -> dict[str, Any]:
        """The run folder's `config.json`, every default spelled out.

        Args:
            sae: hash of the SAE's weights.
            store: hash of the store (of its manifest).
            site: the site.
            baselines: whether baselines are measured.
            twin: hash of the twin SAE's weights, where there is one.
        """
        asked = {"sae": sae, "store": store, "site": str(site), "baselines": baselines}
        return {"kind": KIND, "schema": SCHEMA, "twin": twin} | asked | asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An SAE with what it is measured on."""

    sae: SparseAutoencoder
    """The SAE."""
    store: ActivationStore
    """Activations of the model it was trained on."""
    site: Site
    """Where in the model."""
    model: LanguageModel | DiffusionModel | None
    """The model; None leaves the downstream metrics out."""


def evaluate(
    run: Run,
    sae: SparseAutoencoder,
    store: ActivationStore,
    model: LanguageModel | DiffusionModel | None,
    site: Site,
    config: EvaluateConfig,
    *,
    baselines: bool = True,
    twin: Subject | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure an SAE, write `metrics.json` into the run, and finish the run; gives what it wrote.

    Args:
        run: a run of kind "evaluation"; a complete one is read as it is.
        sae: the SAE.
        store: activations of the model and site it was trained on.
        model: the model, or None for fidelity alone.
        site: the site.
        config: how much to measure.
        baselines: add PCA, the random dictionary and the mean row.
        twin: the random-weight twin's SAE, store and model, for one more row.
        progress: show bars on stderr.

    Raises:
        UserError: the SAE, the store and the model do not belong together, or nothing is held out.
        Failure: a number is not finite.
    """
    with run.lock():
        if run.complete:
            return read_json(run.path / METRICS)
        subject = Subject(sae=sae, store=store, site=site, model=model)
        measured = measure(subject, config, baselines=baselines, progress=progress)
        if twin is not None:
            measured["rows"].append(_twin_row(twin, config, progress=progress))
        write_json(run.path / METRICS, measured)
        run.finish(
            summary=_summary(measured),
            inputs=_inputs(run, store),
            seeds={"seed": config.seed},
            device=str(device_of(sae) if model is None else model.device),
        )
    return measured


def measure(
    subject: Subject, config: EvaluateConfig, *, baselines: bool, progress: bool = False
) -> dict[str, Any]:
    """The contents of `metrics.json` for one SAE; raises as `evaluate` does."""
    _check_widths(subject)
    store = subject.store
    split = split_store(store, config.held_out_share)
    held_out = sequence_spans(store, range(split.evaluation_start, store.n_rows))
    spans = spread_rows(held_out, config.n_rows)
    splices = Splices.of(store, held_out, config.n_ce_tokens)
    if subject.model is not None:
        splices.check(subject.model, store, subject.site)

    candidates = [sae_candidate(subject.sae)]
    limit = norm_limit(subject, spans)
    found = [measure_fidelity(candidates[0], subject, spans, limit, progress=progress)]
    if baselines:
        k = math.floor(found[0].rows.metrics()["l0"] + 0.5)
        training = sequence_spans(store, range(split.training_rows))
        candidates += _baselines(subject, spread_rows(training, config.n_fit_rows), k, config.seed)
        found += [
            measure_fidelity(candidate, subject, spans, limit, progress=progress)
            for candidate in candidates[1:]
        ]
    downstream = _downstream(subject, candidates, splices, config, progress=progress)
    norms = measure_norms(subject, spans)
    return {
        "rows": [
            _row(candidate, fidelity, downstream.get(candidate.name, {}), config)
            for candidate, fidelity in zip(candidates, found, strict=True)
        ],
        "definitions": splices.definitions() | afa.DEFINITIONS,
        "afa": afa_numbers(subject.sae, norms),
        "zf": zf_points(norms),
        "n_rows": found[0].rows.n_rows,
        "n_outliers": found[0].rows.n_rows - found[0].typical.n_rows,
        "outlier_variance_share": _or_null(found[0].rows.outlier_share(found[0].typical)),
        "n_sequences": len(spans),
        **splices.counts(store, measured=bool(downstream)),
        "training_rows": split.training_rows,
        "evaluation_start": split.evaluation_start,
    }


def measure_norms(subject: Subject, spans: Sequence[Span]) -> afa.NormRows:
    """Norms of inputs, codes and reconstructions of the evaluation rows."""
    device = device_of(subject.sae)
    return afa.joined(
        afa.norm_rows(subject.sae, read_rows(subject.store, subject.site, span).to(device))
        for span in spans
    )


def afa_numbers(sae: SparseAutoencoder, norms: afa.NormRows) -> dict[str, float | None]:
    """The approximate-feature-activation diagnostics of `saes.afa`."""
    found = afa.summary(norms, d_sae=sae.config.d_sae, d_in=sae.config.d_in)
    return {name: _or_null(value) for name, value in found.items()}


def zf_points(norms: afa.NormRows) -> dict[str, list[float]]:
    """Some rows' norms of input and code, evenly spaced: the ZF plot of Lee et al. 2025."""
    every = max(1, len(norms.input_norm) // ZF_POINTS)
    return {
        "input_norm": norms.input_norm[::every].tolist(),
        "code_norm": norms.code_norm[::every].tolist(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """A candidate's meters."""

    rows: FidelityMeter
    """Of all evaluation rows."""
    typical: FidelityMeter
    """Of those that are no outliers."""


@torch.no_grad()
def measure_fidelity(
    candidate: Candidate,
    subject: Subject,
    spans: Sequence[Span],
    norm_limit: float,
    *,
    progress: bool = False,
) -> Fidelity:
    """Reconstruct the rows of some sequences; those with a larger norm than the limit are outliers.

    Raises `Failure` where a number is not finite.
    """
    device = device_of(subject.sae)
    rows, typical = (FidelityMeter(n_latents=candidate.n_latents) for _ in range(2))
    for span in tqdm(spans, desc=f"rows: {candidate.label}", disable=not progress):
        x = read_rows(subject.store, subject.site, span).to(device)
        output = candidate.reconstruct(x)
        rows.update(x, output)
        within = x.norm(dim=1) <= norm_limit
        if within.any():
            typical.update(x[within], _some_rows(output, within))
    return Fidelity(rows=rows, typical=typical)


def _some_rows(output: SaeOutput, which: Bool[Tensor, " n"]) -> SaeOutput:
    codes = Codes(values=output.codes.values[which], indices=output.codes.indices[which])
    return SaeOutput(reconstruction=output.reconstruction[which], codes=codes)


def norm_limit(subject: Subject, spans: Sequence[Span]) -> float:
    """The norm beyond which a row of these sequences is an outlier."""
    norms = [read_rows(subject.store, subject.site, span).norm(dim=1) for span in spans]
    return OUTLIER * float(torch.cat(norms).median())


def device_of(sae: SparseAutoencoder) -> torch.device:
    """Where the SAE's weights are."""
    return sae.W_dec.device


def _check_widths(subject: Subject) -> None:
    d_in, d = subject.sae.config.d_in, subject.store.d(subject.site)
    if d_in != d:
        raise UserError(
            f"the SAE reads activations of width {d_in} and {subject.site} of "
            f"{subject.store.run.path} has width {d}; evaluate it on the store of the model and "
            "site that it was trained on."
        )


@torch.no_grad()
def _baselines(subject: Subject, spans: Sequence[Span], k: int, seed: int) -> list[Candidate]:
    """The baselines of L0 `k`, fitted on the rows of some training sequences."""
    store, site = subject.store, subject.site
    parts = (read_rows(store, site, span) for span in spans)
    fitted = fit_principal_axes(parts, store.statistics(site).mean)
    some = spread_rows(spans, N_SCALE_ROWS)
    sample = torch.cat([read_rows(store, site, span) for span in some]).to(device_of(subject.sae))
    # A few outliers would decide the one scale for all rows.
    norms = sample.norm(dim=1)
    sample = sample[norms <= OUTLIER * norms.median()]
    d_sae = subject.sae.config.d_sae
    return [
        pca_candidate(fitted, k),
        random_dictionary_candidate(sample, fitted.mean.float(), d_sae, k, seed),
        _mean_candidate(subject),
    ]


def _mean_candidate(subject: Subject) -> Candidate:
    return constant_candidate("mean", "mean row", subject.store.statistics(subject.site).mean)


def _zero_candidate(subject: Subject) -> Candidate:
    return constant_candidate("zero", "zero", torch.zeros(subject.sae.config.d_in))


def _downstream(
    subject: Subject,
    candidates: Sequence[Candidate],
    splices: Splices,
    config: EvaluateConfig,
    *,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Metrics by candidate, those of the anchors among them; empty where there is no model."""
    if subject.model is None:
        return {}
    anchors = [_mean_candidate(subject), _zero_candidate(subject)]
    return splices.measure(
        subject.model,
        subject.store,
        subject.site,
        list({c.name: c for c in [*candidates, *anchors]}.values()),
        batch=config.batch_sequences,
        n_resamples=config.n_resamples,
        seed=config.seed,
        progress=progress,
    )


def _row(
    candidate: Candidate,
    fidelity: Fidelity,
    downstream: Mapping[str, float],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """One candidate's row of `metrics.json`; null where a metric is not defined."""
    metrics = fidelity.rows.metrics()
    typical = fidelity.typical.metrics()
    for name in ("fvu", "explained_variance"):
        metrics[f"{name}_typical"] = typical[name]
    for name, meter in (("fvu", fidelity.rows), ("fvu_typical", fidelity.typical)):
        n = len(meter.sequences)
        resamples = meter.resampled_fvu(resampling_weights(n, config.n_resamples, config.seed))
        metrics[f"{name}_low"], metrics[f"{name}_high"] = interval(resamples, n)
    metrics |= downstream
    named = {name: _or_null(value) for name, value in metrics.items()}
    return {"name": candidate.name, "label": candidate.label} | named


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _twin_row(twin: Subject, config: EvaluateConfig, *, progress: bool) -> dict[str, Any]:
    row = measure(twin, config, baselines=False, progress=progress)["rows"][0]
    named = {"name": "random_weight_twin", "label": "SAE of the random-weight twin"}
    of_images = isinstance(twin.store.config, ImageStoreConfig)
    return row | named | {"note": IMAGE_TWIN_NOTE if of_images else TWIN_NOTE}


def _summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The SAE's main numbers and how much they rest on."""
    names = (
        "fvu", "fvu_typical", "explained_variance", "l0", "dead_share", "ce_recovered", "kl",
        "pixel_recovered", "latent_recovered",
    )  # fmt: skip
    row = measured["rows"][0]
    counts = ("n_rows", "n_ce_tokens", "n_images")
    counts = {name: measured[name] for name in counts if name in measured}
    return {name: row[name] for name in names if name in row} | counts


def _inputs(run: Run, store: ActivationStore) -> dict[str, str]:
    """Hashes of what was measured."""
    found = {"store": sha256_file(store.run.path / "manifest.json")}
    return found | {name: run.config[name] for name in ("sae", "twin") if run.config.get(name)}

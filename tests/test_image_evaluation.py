"""An SAE of an image model, evaluated: against the pipeline with plain hooks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_index_tree import GRID, SITE, make_sae, make_store, pipeline
from torch import Tensor

from probe.errors import UserError
from probe.runs import Run
from probe.sites import parse_site
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from probe.toy import tiny_sdxl
from saes.evaluation import EvaluateConfig, Subject, evaluate, measure
from saes.split import sequence_spans

CONFIG = EvaluateConfig(
    held_out_share=0.4, n_rows=64, n_ce_tokens=64, n_fit_rows=80, batch_sequences=1, n_resamples=30
)
KINDS = {
    "one step": {},
    "guided": {"steps": 2, "guidance": 3.0},
    "both rows": {"steps": 2, "guidance": 3.0, "rows": "both"},
    "some places": {"places": 6},
}


def config_of(store: ActivationStore) -> ImageStoreConfig:
    assert isinstance(store.config, ImageStoreConfig)
    return store.config


def drawn(store: ActivationStore, image: int, replace: Any = None) -> tuple[Tensor, Tensor]:
    """Pixels and latents of one image, by diffusers alone; `replace` makes a new update."""
    config = config_of(store)
    pipe = pipeline().pipeline
    block = pipe.unet.down_blocks[2].attentions[1]

    def hook(_, args, out):
        first = len(out[0]) - 1 if config.rows == "conditional" else 0
        update = (out[0] - args[0])[first:].permute(0, 2, 3, 1)
        new = args[0].clone()
        new[:first] = out[0][:first]
        new[first:] += replace(update).permute(0, 3, 1, 2)
        return (new,)

    handle = block.register_forward_hook(hook) if replace else None
    call = {
        "num_inference_steps": config.steps, "guidance_scale": config.guidance,
        "generator": torch.Generator().manual_seed(config.seed + image),
    }  # fmt: skip
    try:
        latents = pipe(store.prompts()[image], output_type="latent", **call).images
        call["generator"].manual_seed(config.seed + image)
        pixels = pipe(store.prompts()[image], output_type="pt", **call).images
    finally:
        if handle is not None:
            handle.remove()
    return (pixels * 255).round().double(), latents.double()


@pytest.mark.parametrize("kind", KINDS)
def test_images_move_as_with_plain_hooks(tmp_path, kind) -> None:
    store = make_store(tmp_path, **KINDS[kind])
    sae = make_sae(store)
    subject = Subject(sae=sae, store=store, site=parse_site(SITE), model=pipeline())
    measured = measure(subject, CONFIG, baselines=True)
    rows = {row["name"]: row for row in measured["rows"]}
    assert list(rows) == ["sae", "pca", "random_dictionary", "mean"]
    images = held_out(store, measured["evaluation_start"])
    n = max(1, 64 // (16 * config_of(store).passes_of_image))
    images = [images[i * len(images) // n] for i in range(n)] if n < len(images) else images
    assert measured["n_images"] == len(images) and "n_ce_tokens" not in measured
    mean = store.statistics(SITE).mean
    replacements = {
        "sae": lambda x: sae(x.flatten(0, 2)).reconstruction.view(x.shape),
        "mean": lambda x: mean.expand(x.shape),
        "zero": torch.zeros_like,
    }
    found = {name: [] for name in replacements}
    for image in images:
        pixels, latents = drawn(store, image)
        for name, replace in replacements.items():
            with torch.no_grad():
                new_pixels, new_latents = drawn(store, image, replace)
            found[name].append(
                [(new_pixels - pixels).abs().mean(), (new_latents - latents).square().mean()]
            )
    moved = {name: torch.tensor(values).mean(0) for name, values in found.items()}
    assert moved["zero"][0] > 0.1 and moved["zero"][1] > 1e-6, "the block matters"
    for name in ("sae", "mean"):
        for i, what in enumerate(("pixel", "latent")):
            value, zero = float(moved[name][i]), float(moved["zero"][i])
            assert rows[name][what] == pytest.approx(value, rel=2e-3, abs=2e-3 * zero)
            assert rows[name][f"{what}_zero"] == pytest.approx(zero, rel=4e-3)
            recovered = 1 - moved[name][i] / moved["zero"][i]
            assert rows[name][f"{what}_recovered"] == pytest.approx(float(recovered), abs=5e-3)
    assert rows["mean"]["pixel_recovered_mean"] == 0
    if len(images) > 1:
        row = rows["sae"]
        assert row["pixel_low"] <= row["pixel"] <= row["pixel_high"]


def held_out(store: ActivationStore, start: int) -> list[int]:
    """Images of which every pass lies behind a row, in order."""
    spans = sequence_spans(store, range(start, store.n_rows))
    passes = [span.sequence // config_of(store).passes_of_image for span in spans]
    return [i for i in sorted(set(passes)) if passes.count(i) == config_of(store).passes_of_image]


def test_definitions_name_what_is_measured(tmp_path) -> None:
    store = make_store(tmp_path)
    run = Run.create(tmp_path, "evaluation", {"kind": "evaluation", "sae": "x", "twin": None})
    measured = evaluate(
        run, make_sae(store), store, pipeline(), parse_site(SITE), CONFIG, progress=False
    )
    row = measured["rows"][0]
    assert not {"ce", "kl"} & set(row) and not {"ce", "kl"} & set(measured["definitions"])
    defined = {name for key in measured["definitions"] for name in key.split(", ")}
    plain = {k for k in row if not k.endswith(("_low", "_high")) and k not in ("name", "label")}
    assert plain <= defined
    assert run.summary["pixel_recovered"] == row["pixel_recovered"]
    assert run.summary["n_images"] == measured["n_images"]
    json.dumps(measured, allow_nan=False)


def test_another_model_is_told(tmp_path) -> None:
    store = make_store(tmp_path)
    site = parse_site(SITE)
    other = Subject(sae=make_sae(store), store=store, site=site, model=tiny_sdxl(1))
    with pytest.raises(UserError, match=r"gives other activations at down\.2\.1"):
        measure(other, CONFIG, baselines=False)


def test_the_twin_has_its_own_note(tmp_path) -> None:
    store = make_store(tmp_path)
    subject = Subject(sae=make_sae(store), store=store, site=parse_site(SITE), model=pipeline())
    run = Run.create(tmp_path, "evaluation", {"kind": "evaluation", "sae": "x", "twin": "y"})
    measured = evaluate(
        run, subject.sae, store, subject.model, subject.site, CONFIG, baselines=False,
        twin=subject, progress=False,
    )  # fmt: skip
    assert "draws nothing" in measured["rows"][1]["note"]
    assert GRID == (4, 4) and Path(run.path).is_dir()

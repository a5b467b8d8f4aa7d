"""Published settings of training, by name.

`sdxl-turbo`: the SAEs of SDXL-Turbo's attention blocks (Surkov et al. 2024, 2410.22366, and their
code, github.com/surkovv/sdxl-unbox): TopK with k = 10 of 5,120 latents, four times the width of
their sites; AuxK with 256 dead latents and weight 1/32, dead after 10,000,000 vectors; Adam with
1e-4 and epsilon 6.25e-10, without rise and fall; batches of 4,096; one pass over 384 M vectors. The
rows are read as they are, the loss is over their variance, decoder rows have unit norm and `b_dec`
begins at the geometric median of 32,768 rows. For a site of another width latents and AuxK go with
the width, for another number of rows the steps with that number; k stays.

Known differences: the encoder begins as the decoder's transpose with rows of length 1, where theirs
have 0.58; decoder rows are normalised after a step, where they do it before; the loss's variance is
of the same 32,768 rows, where they take 40,960.
"""

from dataclasses import dataclass, replace
from typing import Literal

from saes.activations import TopK
from saes.training import TrainConfig

PresetName = Literal["sdxl-turbo"]
FITTED = ("d_sae", "k_aux", "steps")
"""Settings that go with the width of the site or the number of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Published settings, and what they were published for."""

    train: TrainConfig
    """The settings."""
    batch_size: int
    """Rows in a batch."""
    width: int
    """Width of the site."""


PRESETS: dict[PresetName, Preset] = {
    "sdxl-turbo": Preset(
        train=TrainConfig(
            d_sae=5120,
            activation=TopK(k=10),
            steps=93_750,
            normalize="none",
            lr=1e-4,
            warmup_steps=0,
            decay_share=0.0,
            eps=6.25e-10,
            k_aux=256,
            auxk_alpha=1 / 32,
            dead_after_tokens=10_000_000,
            init_rows=32_768,
        ),
        batch_size=4096,
        width=1280,
    )
}


def fitted(
    preset: Preset, train: TrainConfig, names: tuple[str, ...], *, width: int, batches: int | None
) -> TrainConfig:
    """Settings fitted to what is trained on.

    Args:
        preset: what they were published for.
        train: the settings.
        names: which of `FITTED` to fit; the others are as a person wants them.
        width: of the site.
        batches: in one pass over the rows; None where nobody knows how many there are.
    """
    sizes = {name: max(1, round(getattr(train, name) * width / preset.width)) for name in FITTED}
    sizes["steps"] = train.steps if batches is None else max(1, batches)
    return replace(train, **{name: sizes[name] for name in names})

"""toy-turbo's model card, written from its numbers."""

from collections.abc import Mapping
from typing import Any

from probe.toyturbo.world import FACTORS

NAMES = ("position", "shape", "colour", "size", "texture", "background", "light")

WHAT_IT_IS = """\
# toy-turbo

A text-to-image model for tests, demonstrations and ground truth. It has the architecture, classes
and block names of SDXL-Turbo at a tenth of its width, draws 64 x 64 scenes in one step, and
knows nothing but a procedural world of one or two things on a 2 x 2 grid. It is no substitute for
SDXL-Turbo, and nothing that is found in it is a finding about SDXL-Turbo.

In return the truth about it is known: every factor of every scene ({factors}), which caption says
what, and what the noise decides where a caption says nothing.

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
prompt = "a large red striped disc at the top left on a navy background lit from above"
image = pipeline(prompt, num_inference_steps=1, guidance_scale=0.0).images[0]
```

## How it was made

`lorgnette make toy-turbo` makes it again: text encoders trained on parsing captions, an autoencoder
(`AutoencoderTiny`, 64 x 64 pixels to 32 x 32 latents), then the U-Net by plain regression of the
scene that a caption and a noise mean together. Where a caption leaves a factor open, a fixed rule
reads its value off low-frequency contrasts of the noise, so the answer is always one scene. The
U-Net predicts v where SDXL-Turbo predicts noise.

**Any split of roles among its blocks is partly made by how it was trained.** Its four carrying
cross-attention blocks were opened one after another: down.2.1 and mid.0 learnt where things are and
their colours and sizes, then up.0.0 shapes, then up.0.1 textures; then what the four give for a
caption with gaps was pulled towards what they gave for the complete one, and last all were trained
together. Meanwhile a temporary head asked the middle for the noise's contrasts. The seven other
cross-attention blocks are the identity.
"""


def model_card(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The card as Markdown, from the run's config and its judged numbers."""
    factors = ", ".join(name for name in FACTORS)
    parts = [WHAT_IT_IS.replace("{factors}", factors), _training(config), _fidelity(card)]
    return "\n".join([*parts, _noise(card), _limits(card)])


def _training(config: Mapping[str, Any]) -> str:
    fits = {name: fit for name, fit in config.items() if isinstance(fit, dict)}
    rows = [
        f"| {name} | {fit['steps']} | {fit['batch']} | {fit['lr']:g} |"
        for name, fit in fits.items()
    ]
    head = "| part | steps | batch | largest rate |\n|---|---|---|---|"
    return "\n".join(["", head, *rows, "", f"Seed {config['seed']}.", ""])


def _fidelity(card: Mapping[str, Any]) -> str:
    rows = {
        "reader on renders": card["reader"],
        "reader on renders through the autoencoder": card["autoencoder"],
        **{f"drawn in {steps} step(s)": found for steps, found in card["steps"].items()},
    }
    lines = [
        "## What it reaches",
        "",
        "Share of values (%) that are as a complete, held-out caption says, as a reader trained on",
        "renders alone sees them. `position` counts cells, by whether they have a thing.",
        "",
        "| | " + " | ".join(NAMES) + " |",
        "|---" * (len(NAMES) + 1) + "|",
    ]
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * found[n]:.1f}" for n in NAMES) + " |")
    return "\n".join([*lines, ""])


def _noise(card: Mapping[str, Any]) -> str:
    lines = [
        "Captions of one thing that leave one factor open, 50 seeds each: the entropy of what is",
        "drawn, that of the world (bits), and how often it is what the noise calls for.",
        "",
        "| open | entropy drawn | entropy of the world | as the noise calls for |",
        "|---|---|---|---|",
    ]
    for name in NAMES:
        found = card["noise"][name]
        lines.append(
            f"| {name} | {found['entropy']:.2f} | {found['prior']:.2f} | "
            f"{100 * found['called']:.0f} % |"
        )
    return "\n".join([*lines, ""])


def _limits(card: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "## Limits",
            "",
            "- It reads only the words of its world; other text means little to it.",
            "- Things never overlap or move within their cells, and there are never more than two.",
            f"- Its text encoders answer {100 * card['parsing']:.1f} % of the questions on the",
            "  factor they know worst.",
            "- Its images vary with the noise only where the caption leaves something open.",
            "",
        ]
    )

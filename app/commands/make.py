"""`lorgnette make`: make what ships with the project."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from app.commands.options import Common, plan, say
from probe.models import Dtype, load_language_model, resolve_device
from probe.writing import FORMS, TOPICS, WritingConfig, write_corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Make what ships under artifacts/ again. It goes on where a stopped run left off.

    `lorgnette make toy-turbo --help` has the options of toy-turbo, this page those of the corpus.

    Example: lorgnette make corpus
    """

    what: Positional[Literal["corpus", "toy-turbo"]]
    """corpus: the built-in text corpus, which SmolLM2 writes under fixed seeds. toy-turbo: a small
    text-to-image model of SDXL-Turbo's architecture, trained on a procedural world."""
    writing: WritingConfig = field(default_factory=WritingConfig)
    dtype: Dtype = "auto"
    """Number format the model runs in; auto is bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTurbo:
    """Train toy-turbo: text encoders, autoencoder, attribute reader, U-Net; then judge it.

    Some three hours on two cores, less on a GPU. It goes on from its last checkpoint.

    Example: lorgnette make toy-turbo --effort 0.01 --root /tmp/try
    """

    what: Positional[Literal["toy-turbo"]]
    """What is made."""
    seed: int = 0
    """Of the weights and of everything drawn while training."""
    effort: float = 1.0
    """Times this many steps of every part: less to try it out, more for a better model."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def command_type(arguments: Sequence[str]) -> type[Any]:
    """The options of what the arguments name."""
    return ToyTurbo if "toy-turbo" in arguments else Command


def run(command: Command | ToyTurbo) -> Path | None:
    """Make it, or say what would be made; gives the folder."""
    return make_model(command) if isinstance(command, ToyTurbo) else make_corpus(command)


def make_corpus(command: Command) -> Path | None:
    """Have SmolLM2 write the corpus, or say what it would write."""
    writing = command.writing
    if command.common.dry_run:
        say(
            plan(
                "lorgnette make corpus would write",
                {
                    "tokens": f"{writing.tokens}, by {writing.model}",
                    "prompts": f"{len(FORMS)} forms x {len(TOPICS)} topics, "
                    f"at most {writing.rounds} rounds",
                    "batch": f"{writing.batch} answers of at most {writing.max_new_tokens} tokens",
                },
            )
        )
        return None
    model = load_language_model(writing.model, dtype=command.dtype, device=command.device)
    return write_corpus(command.common.root / "corpora", model, writing).path


def make_model(command: ToyTurbo) -> Path | None:
    """Train toy-turbo, or say what would be trained."""
    from probe.toyturbo.making import PARTS, ToyTurboConfig, make_toy_turbo

    config = ToyTurboConfig(seed=command.seed).scaled(command.effort)
    if command.common.dry_run:
        fits = {name: getattr(config, name) for name in PARTS}
        rows = {name: f"{fit.steps} steps of {fit.batch}" for name, fit in fits.items()}
        rows["disk"] = "12 MB, and 100 MB of checkpoints meanwhile"
        images = sum(fits[name].steps * fits[name].batch for name in PARTS[3:])
        rows["time"] = f"about {images / 50 / 3600:.1f} h on a core that does 50 images a second"
        say(plan("lorgnette make toy-turbo would train", rows))
        return None
    device = str(resolve_device(command.device))
    return make_toy_turbo(command.common.root / "models", config, device=device).path

"""`lorgnette make`: make what ships with the project."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from app.commands.options import Common, plan, say
from probe.models import Dtype, load_language_model, resolve_device
from probe.toyturbo.making import PARTS, ToyTurboConfig, make_toy_turbo
from probe.writing import FORMS, TOPICS, WritingConfig, write_corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Make what ships under artifacts/ again. It goes on where a stopped run left off.

    Example: lorgnette make corpus

    Example: lorgnette make toy-turbo --device cuda
    """

    what: Positional[Literal["corpus", "toy-turbo"]]
    """corpus: the built-in text corpus, which SmolLM2 writes under fixed seeds. toy-turbo: the
    small text-to-image model of SDXL-Turbo's architecture, trained on its procedural world."""
    writing: WritingConfig = field(default_factory=WritingConfig)
    toy: ToyTurboConfig = field(default_factory=ToyTurboConfig)
    dtype: Dtype = "auto"
    """Number format the corpus is written in; auto is bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Make it, or say what would be made; gives the folder."""
    if command.what == "toy-turbo":
        return make_model(command)
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


def make_model(command: Command) -> Path | None:
    """Train toy-turbo, or say what would be trained."""
    toy = command.toy
    if command.common.dry_run:
        fits = {name: getattr(toy, name) for name in PARTS}
        rows = {name: f"{fit.steps} steps of {fit.batch}" for name, fit in fits.items()}
        rows["disk"] = "about 12 MB, and 90 MB of checkpoints meanwhile"
        rows["time"] = "some 3 hours on a core with AMX"
        say(plan("lorgnette make toy-turbo would train", rows))
        return None
    device = str(resolve_device(command.device))
    return make_toy_turbo(command.common.root / "models", toy, device=device).path

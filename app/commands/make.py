"""`lorgnette make`: make what ships with the project."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from app.commands.options import Common, plan, say
from probe.models import Dtype, load_language_model
from probe.writing import FORMS, TOPICS, WritingConfig, write_corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Make what ships under artifacts/ again. It goes on where a stopped run left off.

    Example: lorgnette make corpus
    """

    what: Positional[Literal["corpus"]]
    """corpus: the built-in text corpus, which SmolLM2 writes under fixed seeds."""
    writing: WritingConfig = field(default_factory=WritingConfig)
    dtype: Dtype = "auto"
    """Number format the model runs in; auto is bfloat16 where the hardware has it."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    common: Common = field(default_factory=Common)


def run(command: Command) -> Path | None:
    """Make it, or say what would be made; gives the folder."""
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

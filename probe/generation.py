"""Text from a model, with or without edits in force.

    tokens = prompt_tokens(model, "Once upon a time")
    generate(model, tokens, edits=edits).text

Hugging Face's `generate` does the work. Edits know the positions of each pass (see
`probe.interventions`), so that generation with a key-value cache and without one are the same up to
rounding; in float32 and greedily they give the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from probe.errors import UserError
from probe.interventions import Edit, applying
from probe.language import LanguageModel
from probe.tokens import Turn, context_size, read_chat, read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """How to go on from a prompt."""

    max_new_tokens: int = 40
    """Tokens to write at most; fewer where the model ends its text."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that have been there already are made less likely."""
    seed: int = 0
    """Seed of the draws."""
    cache: bool = True
    """Keep keys and values of past tokens; without, each step reads the whole text again."""

    def __post_init__(self) -> None:
        sane = self.max_new_tokens > 0 and 0 <= self.temperature < float("inf")
        if not (sane and 0 < self.top_p <= 1 and 0 < self.repetition_penalty < float("inf")):
            raise UserError(
                "generation wants max_new_tokens of 1 or more, a temperature of 0 or more, top_p "
                f"above 0 up to 1 and a repetition penalty above 0; got {self.max_new_tokens}, "
                f"{self.temperature}, {self.top_p} and {self.repetition_penalty}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A prompt and how a model went on."""

    prompt: Int[Tensor, " t"]
    """The prompt's token ids."""
    tokens: Int[Tensor, " n"]
    """The ids of what followed, without an end-of-text token."""
    text: str
    """The same as text."""


def prompt_tokens(
    model: LanguageModel, text: str, *, chat: bool = False, room: int = 0
) -> Int[Tensor, " t"]:
    """A prompt's token ids, preceded by the end-of-text token as every document in a store is.

    Args:
        model: whose tokenizer.
        text: the prompt, or, with `chat`, what the user says.
        chat: put it into the tokenizer's chat template, up to where the assistant answers.
        room: tokens that have to fit in behind it.

    Raises `UserError` for an empty prompt, one that does not fit the context, or a tokenizer
    without a chat template.
    """
    if not text.strip():
        raise UserError("the prompt is empty: type a word or more.")
    turns = [Turn(role="user", content=text)]
    prompt = read_chat(model, turns) if chat else read_text(model, text)
    context = context_size(model)
    if context is not None and len(prompt) + room > context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and {room} are to follow, but {model.spec} "
            f"reads at most {context}; shorten the prompt, or ask for fewer new tokens."
        )
    return torch.tensor(prompt.ids)


class _Listener(BaseStreamer):
    """Passes each new token on, once the prompt has gone by."""

    def __init__(self, hear: Callable[[int], None]) -> None:
        self._hear = hear
        self._prompt_gone_by = False

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, then with each token."""
        if self._prompt_gone_by:
            self._hear(int(value.flatten()[0]))
        self._prompt_gone_by = True

    def end(self) -> None:
        """Called by `generate` at the end."""


def generate(
    model: LanguageModel,
    prompt: Int[Tensor, " t"],
    *,
    edits: Sequence[Edit] = (),
    config: GenerateConfig | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Go on from one prompt.

    Args:
        model: the model.
        prompt: its token ids, as `prompt_tokens` gives them.
        edits: what to change on the way; none for the model as it is.
        config: how.
        on_token: called with each new token's id as it comes.

    Raises `UserError` where an edit's site is not in the model.
    """
    listener = None if on_token is None else _Listener(on_token)
    return _generate(model, prompt[None], edits, config or GenerateConfig(), listener)[0]


def generate_rows(
    model: LanguageModel,
    prompt: Int[Tensor, " t"],
    n_rows: int,
    *,
    edits: Sequence[Edit],
    config: GenerateConfig | None = None,
) -> list[Generation]:
    """Go on from one prompt in several rows of one batch, each with its own edits (`Edit.row`)."""
    rows = prompt[None].expand(n_rows, -1)
    return _generate(model, rows, edits, config or GenerateConfig(), None)


def generate_many(
    model: LanguageModel, prompts: Sequence[Sequence[int]], *, config: GenerateConfig | None = None
) -> list[Generation]:
    """Go on from many prompts side by side, padded on the left and told so.

    Padding changes results by rounding alone. Edits that know positions (`Edit`) count padding
    too: for those, `generate_rows`.

    Raises `UserError` where there is no prompt, or one is empty.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise UserError("prompts of at least one token were wanted; give each a word or more.")
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), model.separator_id)
    attended = torch.zeros(len(prompts), longest, dtype=torch.long)
    for number, prompt in enumerate(prompts):
        tokens[number, longest - len(prompt) :] = torch.tensor(list(prompt))
        attended[number, longest - len(prompt) :] = 1
    found = _generate(model, tokens, (), config or GenerateConfig(), None, attended)
    return [
        replace(one, prompt=torch.tensor(list(prompt)))
        for one, prompt in zip(found, prompts, strict=True)
    ]


def _generate(
    model: LanguageModel,
    prompt: Int[Tensor, "b t"],
    edits: Sequence[Edit],
    config: GenerateConfig,
    listener: _Listener | None,
    attended: Int[Tensor, "b t"] | None = None,
) -> list[Generation]:
    tokens = prompt.to(model.device)
    mask = torch.ones_like(tokens) if attended is None else attended.to(model.device)
    drawn = config.temperature > 0
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), applying(model, edits):
        torch.manual_seed(config.seed)
        out = model.model.generate(  # type: ignore[reportCallIssue]
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            do_sample=drawn,
            temperature=config.temperature if drawn else None,
            top_p=config.top_p if drawn else None,
            top_k=None,
            repetition_penalty=config.repetition_penalty,
            use_cache=config.cache,
            pad_token_id=model.separator_id,
            streamer=listener,
        )
    return [_generation(model, row.cpu(), tokens.shape[1]) for row in out]


def _generation(model: LanguageModel, row: Int[Tensor, " m"], n_prompt: int) -> Generation:
    prompt, new = row[:n_prompt], row[n_prompt:]
    ends = model.model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else (ends or [model.separator_id]))
    at = torch.isin(new, ends).nonzero()
    new = new[: int(at[0])] if len(at) else new
    return Generation(prompt=prompt, tokens=new, text=str(model.tokenizer.decode(new)))

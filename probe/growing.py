"""The last tokens of many prompts that share a beginning, for about the price of the longest one.

    readings = [Reading(n_trunk=n) for n in (10, 100, 1000)]
    last = read_last_tokens(model, trunk, readings, sites)
    last.values[site]           # [3, d]: what prompts of 10, 100 and 1000 tokens end in

A token of a causal model depends on none that follows it. So the last tokens of all beginnings of
one long text, the trunk, are read in one pass over it; and prompts that go on in their own way
after a beginning, with a suffix, cost their suffixes, the key-value cache standing for the rest.
Suffixes are read together, side by side behind the trunk: each token stands at its own prompt's
position and attends to its own prompt alone. What is kept of the trunk does not change: suffixes
have a copy of the cache, whose tensors are shared. (A model that has windows of its own reads them
one by one.)
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from probe.attention import AS_IT_IS, Visible, additive
from probe.capture import reading
from probe.errors import UserError
from probe.language import LanguageModel
from probe.sites import Site
from probe.tokens import context_size

CHUNK = 1024
"""Tokens of the trunk that go through the model together at most."""

Say = Callable[[int], None]
"""Told how many tokens were read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A prompt whose last token is read: a beginning of the trunk, and what follows it."""

    n_trunk: int
    """Tokens of the trunk, 1 or more."""
    suffix: tuple[int, ...] = ()
    """Token numbers after them."""

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return self.n_trunk + len(self.suffix)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastTokens:
    """What a model holds at the last token of each of r prompts."""

    values: dict[Site, Float[Tensor, "r d"]]
    """By site; float32, of a model in float64 float64. On the CPU."""
    logits: Float[Tensor, "r v"]
    """Predictions of the next token, likewise."""


@torch.no_grad()
def read_last_tokens(
    model: LanguageModel,
    trunk: Int[Tensor, " t"],
    readings: Sequence[Reading],
    sites: Sequence[Site] = (),
    *,
    visible: Visible = AS_IT_IS,
    say: Say | None = None,
) -> LastTokens:
    """Read the last token of each prompt.

    Args:
        model: the model; edits that are in force (`probe.interventions.applying`) are made.
        trunk: the tokens that the prompts begin with.
        readings: the prompts.
        sites: what is read beside the logits.
        visible: which tokens are attended to.
        say: told of progress.

    Raises `UserError` where a prompt is longer than the trunk or the model's context, or a site is
    not in the model.
    """
    check_readings(model, len(trunk), readings)
    reader = _Reader(model, sites, visible, say)
    ends = sorted({one.n_trunk for one in readings})
    branches = reader.branch_points(readings)
    start = 0
    while start < ends[-1]:
        stop = min(start + CHUNK, ends[-1], *(end for end in branches if end > start))
        here = [one for one in dict.fromkeys(readings) if start < one.n_trunk <= stop]
        reader.trunk(trunk[start:stop], start, [one for one in here if not one.suffix])
        for some in _batches([one for one in here if one.suffix]):
            reader.suffixes(some)
        start = stop
    return reader.gathered(readings)


def _batches(readings: Sequence[Reading]) -> Iterator[list[Reading]]:
    """Prompts whose suffixes go through the model together."""
    batch: list[Reading] = []
    for one in readings:
        if batch and sum(len(other.suffix) for other in batch) + len(one.suffix) > CHUNK:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def check_readings(model: LanguageModel, n_trunk: int, readings: Sequence[Reading]) -> None:
    """Raise `UserError` where there is no prompt, or one is too long."""
    if not readings:
        raise UserError("no prompt was given to read; give one or more.")
    if wrong := [one for one in readings if not 1 <= one.n_trunk <= n_trunk]:
        raise UserError(
            f"a prompt takes {wrong[0].n_trunk} tokens of a text that has 1 to {n_trunk}."
        )
    longest, size = max(map(len, readings)), context_size(model)
    if size is not None and longest > size:
        raise UserError(
            f"the longest prompt has {longest:,} tokens and {model.spec} reads at most {size:,}: "
            "ask for shorter ones."
        )


class _Reader:
    """A trunk on its way through the model."""

    def __init__(
        self, model: LanguageModel, sites: Sequence[Site], visible: Visible, say: Say | None
    ) -> None:
        self.model, self.sites, self.visible, self.say = model, sites, visible, say
        layers = DynamicCache(config=model.model.config).layers
        attending = [layer for layer in layers if isinstance(layer, DynamicLayer)]
        if len(attending) < len(layers):
            raise UserError(
                f"{model.spec} keeps more between tokens than keys and values "
                f"({type(model.model).__name__}); choose a transformer whose every layer attends."
            )
        self.windows = any(layer.is_sliding for layer in attending) and visible == AS_IT_IS
        self.cache = DynamicCache()
        self.found: dict[Reading, tuple[dict[Site, Tensor], Tensor]] = {}

    def branch_points(self, readings: Sequence[Reading]) -> set[int]:
        """Where the trunk has to stop for suffixes: where they branch off, if one by one."""
        return {one.n_trunk for one in readings if one.suffix} if self.windows else set()

    def trunk(self, tokens: Int[Tensor, " t"], start: int, wanted: Sequence[Reading]) -> None:
        """Read the trunk's next tokens, which begin at `start`."""
        mask = self.visible.mask(start, start + len(tokens), self.model.dtype, self.model.device)
        self._run(
            self.cache, tokens, [one.n_trunk - start - 1 for one in wanted], wanted, mask=mask
        )

    def suffixes(self, readings: Sequence[Reading]) -> None:
        """Read prompts' suffixes after the trunk so far."""
        if self.windows:
            for one in readings:
                self._run(
                    branched(self.cache), torch.tensor(one.suffix), [len(one.suffix) - 1], [one]
                )
            return
        lengths = torch.tensor([len(one.suffix) for one in readings])
        starts = torch.tensor([one.n_trunk for one in readings])
        tokens = torch.tensor([token for one in readings for token in one.suffix])
        ends = lengths.cumsum(0)
        owner = torch.arange(len(readings)).repeat_interleave(lengths)
        positions = torch.arange(len(tokens)) - (ends - lengths)[owner] + starts[owner]
        mask = self._side_by_side(owner, starts[owner], positions)
        self._run(
            branched(self.cache), tokens, (ends - 1).tolist(), readings, mask=mask,
            positions=positions,
        )  # fmt: skip

    def _side_by_side(
        self, owner: Int[Tensor, " s"], starts: Int[Tensor, " s"], positions: Int[Tensor, " s"]
    ) -> Float[Tensor, "1 1 s k"]:
        """Which keys suffix tokens see: of the trunk what their prompt has, of the suffixes their
        own up to themselves, and of both what is visible."""
        n_trunk = self.cache.get_seq_length()
        before = torch.arange(n_trunk)
        own = torch.cat(
            [
                before < starts[:, None],
                (owner[:, None] == owner) & (positions <= positions[:, None]),
            ],
            dim=1,
        )
        keys = torch.cat([before, positions])
        seen = own & self.visible.seen(positions[:, None], keys)
        return additive(seen, self.model.dtype, self.model.device)

    def _run(
        self,
        cache: DynamicCache,
        tokens: Int[Tensor, " t"],
        places: Sequence[int],
        wanted: Sequence[Reading],
        *,
        mask: Float[Tensor, "1 1 q k"] | None = None,
        positions: Int[Tensor, " t"] | None = None,
    ) -> None:
        """One pass; keeps what the tokens at `places` hold, for the prompts `wanted`."""
        model, values = self.model, {}
        rows = torch.tensor(places, dtype=torch.long, device=model.device)

        def record(site: Site, tensor: Tensor) -> None:
            values[site] = _kept(tensor[0, rows])

        with contextlib.ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(reading(model, site, record))
            out = model.model(
                input_ids=tokens[None].to(model.device), attention_mask=mask,
                position_ids=None if positions is None else positions[None].to(model.device),
                past_key_values=cache, use_cache=True, logits_to_keep=rows,
            )  # fmt: skip
        if self.say is not None:
            self.say(len(tokens))
        logits = _kept(out.logits[0])
        for i, one in enumerate(wanted):
            self.found[one] = {site: kept[i] for site, kept in values.items()}, logits[i]

    def gathered(self, readings: Sequence[Reading]) -> LastTokens:
        """What was read, in the order of the prompts."""
        found = [self.found[one] for one in readings]
        return LastTokens(
            values={site: torch.stack([held[site] for held, _ in found]) for site in self.sites},
            logits=torch.stack([predicted for _, predicted in found]),
        )


def branched(cache: DynamicCache) -> DynamicCache:
    """A copy of a cache that may grow by itself; the tensors are shared until it does."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def _kept(rows: Tensor) -> Tensor:
    """Rows as they are kept: on the CPU, in float32 at least."""
    return rows.detach().to("cpu", torch.promote_types(rows.dtype, torch.float32))

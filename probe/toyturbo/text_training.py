"""Text encoders that know what captions say: trained to parse them, before there is a U-Net.

A temporary probe reads the two encoders' last layers but one, side by side as the U-Net will: two
queries ask for the first and the second thing mentioned, four for the thing in each cell, and one
for the scene; each answer may be "not said". The pooled text, which the U-Net gets beside, answers
for the scene too. After this the encoders stay as they are.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from probe.toyturbo.briefs import BRIEF_FACTORS, UNSAID, Brief, describe, draw_briefs
from probe.toyturbo.fitting import seeded
from probe.toyturbo.parts import MAX_TOKENS, TEXT_WIDTHS
from probe.toyturbo.world import CELLS, FACTORS, SCENE_FACTORS, THING_FACTORS

THING_SIZES = [len(FACTORS[name]) + 1 for name in BRIEF_FACTORS]
CELL_SIZES = [2, *(len(FACTORS[name]) + 1 for name in THING_FACTORS)]
SCENE_SIZES = [3, *(len(FACTORS[name]) + 1 for name in SCENE_FACTORS)]


class TextEncoders(nn.Module):
    """Both encoders as the pipeline uses them."""

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(
        self, tokens: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b p"]]:
        """What the U-Net gets: a vector for each token, and the pooled text."""
        first = self.first(tokens, output_hidden_states=True)
        second = self.second(tokens, output_hidden_states=True)
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return context, second.text_embeds


class Parser(nn.Module):
    """The encoders with the probe that trains them."""

    def __init__(self, encoders: TextEncoders) -> None:
        super().__init__()
        width = sum(TEXT_WIDTHS)
        self.encoders = encoders
        self.queries = nn.Parameter(torch.randn(2 + CELLS + 1, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.of_thing = nn.Linear(width, sum(THING_SIZES))
        self.of_cell = nn.Linear(width, sum(CELL_SIZES))
        self.of_scene = nn.Linear(width, sum(SCENE_SIZES))
        self.of_pooled = nn.Linear(TEXT_WIDTHS[1], sum(SCENE_SIZES))

    def forward(
        self, tokens: Int[Tensor, "b t"]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits of what each thing mentioned, each cell and (twice) the scene are."""
        context, pooled = self.encoders(tokens)
        queries = self.queries.expand(len(tokens), -1, -1)
        found = self.norm(self.attention(queries, context, context, need_weights=False)[0])
        things, cells, scene = found.split([2, CELLS, 1], dim=1)
        both = torch.cat([self.of_scene(scene), self.of_pooled(pooled)[:, None]], dim=1)
        return (
            list(self.of_thing(things).split(THING_SIZES, dim=-1)),
            list(self.of_cell(cells).split(CELL_SIZES, dim=-1)),
            list(both.split(SCENE_SIZES, dim=-1)),
        )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Int[Tensor, "b t"]:
    """Captions as the pipeline tokenises them."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )["input_ids"]


def parsing_loss(
    parser: Parser, tokenizer: CLIPTokenizer, step: int, batch: int, seed: int
) -> Tensor:
    """Cross-entropy of everything a batch of captions says, and of what it does not."""
    brief = draw_briefs(batch, seeded(seed, step), gaps=0.6, empty=0.02)
    pairs = _answers(parser, tokenizer, brief)
    return torch.stack([functional.cross_entropy(logits, truth) for logits, truth in pairs]).sum()


@torch.no_grad()
def parsing_accuracy(parser: Parser, tokenizer: CLIPTokenizer, seed: int, n: int) -> float:
    """The worst share of right answers over all questions, on captions never seen."""
    brief = draw_briefs(n, seeded(seed, -1), gaps=0.6)
    pairs = _answers(parser, tokenizer, brief)
    return min(float((logits.argmax(-1) == truth).float().mean()) for logits, truth in pairs)


def _answers(parser: Parser, tokenizer: CLIPTokenizer, brief: Brief) -> list[tuple[Tensor, Tensor]]:
    """Logits and the right answer of every question that has one."""
    things, cells, scene = parser(tokenize(tokenizer, describe(brief)))
    mentioned = torch.arange(2) < brief.count[:, None]
    pairs = [
        (logits[mentioned], brief.things[mentioned][:, i] + 1) for i, logits in enumerate(things)
    ]
    taken, values = _by_cell(brief)
    pairs.append((cells[0].flatten(0, 1), taken.flatten().long()))
    pairs += [(logits[taken], values[taken][:, i]) for i, logits in enumerate(cells[1:])]
    count = brief.count.clamp(min=0)
    for i, truth in enumerate([count, *(brief.surround + 1).unbind(1)]):
        pairs += [(scene[i][:, way], truth) for way in range(2)]
    return pairs


def _by_cell(brief: Brief) -> tuple[Tensor, Tensor]:
    """Whether each cell is named as some thing's place, and that thing's factors, 0 for unsaid."""
    taken = torch.zeros(len(brief), CELLS, dtype=torch.bool)
    values = torch.zeros(len(brief), CELLS, len(THING_FACTORS), dtype=torch.long)
    for i in range(2):
        cell = brief.things[:, i, 0]
        rows = (cell != UNSAID).nonzero().squeeze(1)
        taken[rows, cell[rows]] = True
        values[rows, cell[rows]] = brief.things[rows, i, 1:] + 1
    return taken, values

"""The built-in corpus: varied English that SmolLM2 itself writes under fixed seeds.

Every prompt joins one of `FORMS` (story, letter, code, ...) with one of `TOPICS`; `rounds` passes
over all pairs, each in a seeded order, are answered in batches by sampling (temperature and top-k).
Answers are cut at their last whole sentence and filtered:

    short       fewer than 40 tokens
    loop        under 70 % of its 6-token windows are different ones
    duplicate   over 30 % of its 8-token windows stand in an answer already taken

Each batch has a generator of its own and is written to `parts/` when it is done, so a killed run
goes on after its last batch. Made with `lorgnette make corpus`.
"""

import itertools
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from probe.corpora import BUILTIN, DOCUMENTS
from probe.errors import UserError
from probe.language import LanguageModel
from probe.runs import Run, atomic_path

FORMS = {
    "story": "Write a short story about {}.",
    "explanation": "Explain {} to a curious beginner.",
    "dialogue": "Write a dialogue between two people who disagree about {}.",
    "letter": "Write a personal letter that mentions {}.",
    "list": "Write a numbered list of ten facts about {}, with a sentence for each.",
    "news": "Write a local newspaper report about {}.",
    "howto": "Give step by step instructions for a task that involves {}.",
    "poem": "Write a poem about {}.",
    "questions": "Write five quiz questions about {} and answer each of them.",
    "review": "Write a review of a book about {}.",
    "speech": "Write the opening of a speech about {} for a public meeting.",
    "diary": "Write a diary entry of a person whose day was changed by {}.",
    "code": "Write a short Python program that deals with {}, with comments.",
    "arithmetic": "Make up a word problem with numbers about {} and solve it step by step.",
    "history": "Describe the history of {} in a few paragraphs.",
    "email": "Write a business email about {}.",
}
TOPICS = (
    "the ocean tides", "a lost dog", "bread baking", "the moon", "public libraries",
    "earthquakes", "a train journey", "chess", "honey bees", "the price of apples",
    "old photographs", "volcanoes", "a school garden", "electric cars", "the human heart",
    "a broken clock", "migrating birds", "football", "ancient Rome", "the stock market",
    "a wedding", "rain forests", "telescopes", "a hospital night shift", "maps", "cheese making",
    "the violin", "a court case", "winter storms", "bridges", "the alphabet", "a football coach",
    "tea", "dinosaurs", "a village festival", "computer viruses", "the desert", "an election",
    "knitting", "sharks", "a museum theft", "rivers", "space travel", "a new neighbour",
    "vaccines", "coffee prices", "mountain climbing", "dreams", "a bakery's accounts",
    "the French language", "wolves", "a city bus route", "magnets", "the weather forecast",
    "an elderly teacher", "coral reefs", "bicycles", "a family recipe", "the calendar",
    "solar power", "a haunted house", "sleep", "paper recycling", "a piano lesson",
    "the immune system", "fishing boats", "a job interview", "prime numbers", "butterflies",
    "a power cut", "the theatre", "salt", "a long-distance friendship", "temperature records",
    "glass", "an airport", "pottery", "the brain", "a lottery ticket", "potatoes",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingConfig:
    """How the built-in corpus is written."""

    model: str = "smollm2"
    """The model that writes."""
    tokens: int = 640_000
    """Stop when the filtered answers have at least so many tokens."""
    rounds: int = 8
    """Most passes over all pairs of form and topic."""
    batch: int = 160
    """Answers written side by side."""
    max_new_tokens: int = 320
    """Longest answer, in tokens."""
    temperature: float = 0.9
    """Sampling temperature."""
    top_k: int = 50
    """Sample among so many likeliest tokens."""
    seed: int = 0
    """Seed of the prompts' order and of every batch's generator."""


def write_corpus(
    parent: Path, model: LanguageModel, config: WritingConfig, *, progress: bool = True
) -> Run:
    """Write the built-in corpus, or go on with it; gives its run folder, complete.

    Raises `UserError` where the rounds end before `config.tokens` tokens have been kept.
    """
    run = Run.create(
        parent, BUILTIN, {"kind": "corpus", "dtype": str(model.dtype)} | asdict(config)
    )
    if run.complete:
        return run
    with run.lock(), tqdm(total=config.tokens, unit="tok", disable=not progress) as bar:
        kept = AnswerFilter(model.tokenizer)
        for number, prompts in enumerate(prompt_batches(config)):
            answers = _batch_of_answers(run.path, number, prompts, model, config)
            kept.add(answers)
            bar.update(kept.n_tokens - bar.n)
            bar.set_postfix(kept=len(kept.rows), dropped=sum(kept.dropped.values()))
            if kept.n_tokens >= config.tokens:
                return _finish(run, str(model.device), config, kept)
        raise UserError(
            f"{config.rounds} rounds gave {kept.n_tokens} tokens where {config.tokens} were "
            "wanted; ask for more rounds."
        )


def prompt_batches(config: WritingConfig) -> Iterator[list[tuple[str, str]]]:
    """Batches of (form, topic) pairs, in the seeded order that the corpus is written in."""
    shuffled = []
    for number in range(config.rounds):
        pairs = list(itertools.product(FORMS, TOPICS))
        random.Random(f"{config.seed}-{number}").shuffle(pairs)
        shuffled += pairs
    for start in range(0, len(shuffled), config.batch):
        yield shuffled[start : start + config.batch]


def _batch_of_answers(
    folder: Path,
    number: int,
    prompts: Sequence[tuple[str, str]],
    model: LanguageModel,
    config: WritingConfig,
) -> list[dict[str, str]]:
    """One batch's answers, from `parts/` where it has been written before."""
    path = folder / "parts" / f"part-{number:04d}.json"
    if not path.is_file():
        generator = torch.Generator(device=model.device).manual_seed(config.seed * 100_003 + number)
        asked = [FORMS[form].format(topic) for form, topic in prompts]
        texts = answer(model, asked, config, generator)
        rows = [
            {"id": f"{form}/{topic}/{number}", "form": form, "topic": topic, "text": whole(text)}
            for (form, topic), text in zip(prompts, texts, strict=True)
        ]
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(rows))
    return json.loads(path.read_text())


class AnswerFilter:
    """Takes answers one by one and keeps those that are neither short, looping nor repeated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rows: list[dict[str, str]] = []
        self.n_tokens = 0
        self.dropped = {"short": 0, "loop": 0, "duplicate": 0}
        self._seen: set[int] = set()

    def add(self, answers: Sequence[dict[str, str]]) -> None:
        """Judge a batch of answers in order."""
        for row in answers:
            words = re.findall(r"\w+|[^\w\s]", row["text"])
            reason = self._judge(words)
            if reason is not None:
                self.dropped[reason] += 1
                continue
            self._seen.update(map(hash_window, windows(words, 8)))
            self.rows.append(row)
            self.n_tokens += len(self.tokenizer.encode(row["text"], add_special_tokens=False))

    def _judge(self, words: Sequence[str]) -> str | None:
        if len(words) < 40:
            return "short"
        loops = windows(words, 6)
        if len(set(loops)) < 0.7 * len(loops):
            return "loop"
        known = [hash_window(window) in self._seen for window in windows(words, 8)]
        return "duplicate" if sum(known) > 0.3 * len(known) else None


def windows(words: Sequence[str], width: int) -> list[tuple[str, ...]]:
    """All runs of `width` neighbouring words."""
    return [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]


def hash_window(window: tuple[str, ...]) -> int:
    """A number that stands for a run of words, the same in every process."""
    return zlib.crc32(" ".join(window).encode())


def whole(text: str) -> str:
    """The text up to the end of its last whole sentence or line; all of it where there is none."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s|$)|\n", text)]
    return text[: ends[-1]].strip() if ends else text.strip()


@torch.inference_mode()
def answer(
    model: LanguageModel,
    prompts: Sequence[str],
    config: WritingConfig,
    generator: torch.Generator,
) -> list[str]:
    """Sample an answer to each prompt, all side by side; finished ones leave the batch."""
    chats = [
        str(
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
        for prompt in prompts
    ]
    encoded = model.tokenizer(
        chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(model.device)
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    written: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=model.device)
    cache = DynamicCache(config=model.model.config)
    unembed = model.model.get_output_embeddings()
    assert unembed is not None, "a causal language model has an unembedding"
    for _ in range(config.max_new_tokens):
        hidden = model.model.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = unembed(hidden)
        tokens = sample(logits, config.temperature, config.top_k, generator)
        going = (tokens[:, 0] != model.separator_id).nonzero()[:, 0]
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, tokens, mask = alive[going], tokens[going], mask[going]
        if len(alive) == 0:
            break
        for row, token in zip(alive.tolist(), tokens[:, 0].tolist(), strict=True):
            written[row].append(token)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return model.tokenizer.batch_decode(written, skip_special_tokens=True)


def sample(
    logits: Float[Tensor, "b v"], temperature: float, top_k: int, generator: torch.Generator
) -> Int[Tensor, "b 1"]:
    """Draw a token a row among the `top_k` likeliest, at the given temperature."""
    values, indices = logits.topk(top_k)
    drawn = torch.multinomial(
        torch.softmax(values.float() / temperature, dim=-1), 1, generator=generator
    )
    return indices.gather(1, drawn)


CARD = """# The built-in corpus

{n_documents} documents, {n_tokens} tokens of varied English, written by SmolLM2-135M-Instruct
(Apache-2.0) and by nobody else: every text is the model's own answer to one of {n_forms} forms
({forms}) joined with one of {n_topics} topics, sampled under fixed seeds. What it says is often
wrong; it is here to exercise a language model, not to teach.

Filtered out: {dropped}. Columns of `documents.parquet`: `id`, `form`, `topic`, `text`.

Make it again with `lorgnette make corpus`. Sampling in another number format or on other hardware
gives other texts of the same kind.
"""


def _finish(run: Run, device: str, config: WritingConfig, kept: AnswerFilter) -> Run:
    with atomic_path(run.path / DOCUMENTS) as temporary:
        pq.write_table(
            pa.Table.from_pylist(kept.rows), temporary, compression="zstd", compression_level=19
        )
    dropped = ", ".join(f"{count} {reason}" for reason, count in kept.dropped.items())
    (run.path / "README.md").write_text(
        CARD.format(
            n_documents=len(kept.rows),
            n_tokens=kept.n_tokens,
            n_forms=len(FORMS),
            forms=", ".join(FORMS),
            n_topics=len(TOPICS),
            dropped=dropped,
        )
    )
    for part in (run.path / "parts").iterdir():
        part.unlink()
    (run.path / "parts").rmdir()
    run.finish(
        summary={"n_documents": len(kept.rows), "n_tokens": kept.n_tokens, "dropped": kept.dropped},
        inputs={"model": config.model},
        seeds={"seed": config.seed},
        device=device,
    )
    return run

"""Pairs of prompt sets that differ in one thing, divided into training, validation and test.

Three contrasts are built in, written for this project: every prompt is a frame with a topic put
into it, and both sets get the same frames and topics, so that the sets differ in nothing else.

    french      asked in French or in English
    questions   asked as a question or told as a statement, the closing mark left out of both
    sentiment   speaks well of a thing or badly

Training, validation and test have frames and topics of their own: what tells the test prompts
apart is not a sentence that training has seen. Other sets come from files (`probe.prompt_sets`).
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from probe.errors import UserError
from probe.prompt_sets import read_prompts

Builtin = Literal["french", "questions", "sentiment"]
SHARES = (4, 1, 1)
"""Training, validation and test prompts of a file, in parts."""
LEAST = 12
"""Prompts that each file must hold: two for validation and two for the test."""

TOPICS = (
    ("the bread", "le pain"), ("the rain", "la pluie"), ("the sea", "la mer"),
    ("the train", "le train"), ("the garden", "le jardin"), ("the music", "la musique"),
    ("the winter", "l'hiver"), ("the school", "l'école"), ("the market", "le marché"),
    ("the coffee", "le café"), ("the library", "la bibliothèque"), ("the forest", "la forêt"),
    ("the bicycle", "le vélo"), ("the kitchen", "la cuisine"), ("the newspaper", "le journal"),
    ("the mountain", "la montagne"),
    ("the river", "la rivière"), ("the cheese", "le fromage"), ("the theatre", "le théâtre"),
    ("the moon", "la lune"), ("the harbour", "le port"), ("the telephone", "le téléphone"),
    ("the summer", "l'été"), ("the village", "le village"),
    ("the wind", "le vent"), ("the museum", "le musée"), ("the bridge", "le pont"),
    ("the soup", "la soupe"), ("the cinema", "le cinéma"), ("the island", "l'île"),
    ("the clock", "l'horloge"), ("the snow", "la neige"),
)  # fmt: skip
"""Things to speak of, in English and in French."""
TOPIC_SPLIT = (16, 24, 32)
"""Where the topics of training, validation and test end."""
FRAME_SPLIT = (8, 12, 16)
"""Where the frames of training, validation and test end."""

FRAMES: dict[Builtin, tuple[tuple[str, str], ...]] = {
    "french": (
        ("Explique en une phrase ce que {x} change dans une ville.",
         "Explain in one sentence what {x} changes in a town."),
        ("Pourquoi {x} plaît autant aux enfants ?", "Why do children like {x} so much?"),
        ("Écris deux lignes sur {x}.", "Write two lines about {x}."),
        ("Comment décrire {x} avec des mots simples ?",
         "How can one describe {x} in simple words?"),
        ("Raconte une histoire courte dans laquelle {x} joue un rôle.",
         "Tell a short story in which {x} plays a part."),
        ("Que disait ma grand-mère quand elle voyait {x} ?",
         "What did my grandmother say when she saw {x}?"),
        ("Donne trois raisons d'aimer {x}.", "Give three reasons to love {x}."),
        ("Cherche une bonne devise avec {x}.", "Find a good motto with {x}."),
        ("Quel souvenir garde-t-on en quittant {x} ?",
         "What memory does one keep when leaving {x}?"),
        ("Compare {x} avec un vieil ami.", "Compare {x} with an old friend."),
        ("Invente une devinette dont la réponse est {x}.",
         "Make up a riddle whose answer is {x}."),
        ("Où se trouve {x} dans ce tableau ?", "Where is {x} in this painting?"),
        ("Résume ce que chacun sait déjà sur {x}.",
         "Sum up what everybody already knows about {x}."),
        ("Qui a peint {x} le premier ?", "Who was the first to paint {x}?"),
        ("Propose un titre de livre avec {x}.", "Suggest a book title with {x}."),
        ("Est-ce que {x} vaut un long voyage ?", "Is {x} worth a long journey?"),
    ),
    "questions": (
        ("Does {x} matter to a small town", "It is clear that {x} matters to a small town"),
        ("Why did my neighbour paint {x}", "Last year my neighbour painted {x}"),
        ("Is {x} older than we think", "Surely {x} is older than we think"),
        ("When will {x} look different", "One day {x} will look different"),
        ("Who talks about {x} at dinner", "My aunt talks about {x} at dinner"),
        ("Can a child draw {x} from memory", "A child can draw {x} from memory"),
        ("Has anyone written about {x}", "Many people have written about {x}"),
        ("What makes {x} so quiet at night", "Nothing makes {x} so quiet as the night"),
        ("Would you miss {x} on a long journey", "I would miss {x} on a long journey"),
        ("How does {x} change in autumn", "Slowly {x} changes in autumn"),
        ("Did the poet mention {x}", "The poet mentioned {x}"),
        ("Are there songs about {x}", "There are songs about {x}"),
        ("Which painter loved {x} most", "That painter loved {x} most"),
        ("Should we begin with {x}", "We should begin with {x}"),
        ("Do visitors remember {x}", "Visitors remember {x}"),
        ("Where did {x} appear first", "In the old photograph {x} appeared first"),
    ),
    "sentiment": (
        ("I love {x}, it made my whole week better.", "I hate {x}, it made my whole week worse."),
        ("What a joy {x} was today.", "What a misery {x} was today."),
        ("Everyone at home is delighted with {x}.", "Everyone at home is disgusted with {x}."),
        ("My morning with {x} was wonderful.", "My morning with {x} was horrible."),
        ("I would happily pay twice for {x}.", "I would never pay a penny for {x}."),
        ("Nothing has pleased me like {x} in years.", "Nothing has annoyed me like {x} in years."),
        ("The way they care for {x} is excellent.", "The way they neglect {x} is shameful."),
        ("We came home smiling because of {x}.", "We came home crying because of {x}."),
        ("Thanks to {x} our evening was perfect.", "Because of {x} our evening was ruined."),
        ("My friends admire {x} and so do I.", "My friends despise {x} and so do I."),
        ("I was pleasantly surprised by {x}.", "I was bitterly disappointed by {x}."),
        ("It is a pleasure to talk about {x}.", "It is a pain to talk about {x}."),
        ("I cannot praise {x} enough.", "I cannot complain about {x} enough."),
        ("The best part of the trip was {x}.", "The worst part of the trip was {x}."),
        ("How lovely {x} turned out to be.", "How dreadful {x} turned out to be."),
        ("Seeing {x} filled me with hope.", "Seeing {x} filled me with dread."),
    ),
}  # fmt: skip
"""Frames of the positive and the negative set of each contrast."""
NAMES: dict[Builtin, tuple[str, str]] = {
    "french": ("French", "English"),
    "questions": ("questions", "statements"),
    "sentiment": ("praise", "complaint"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Prompts of both sets for one purpose."""

    positive: tuple[str, ...]
    """Those that have what the contrast is about."""
    negative: tuple[str, ...]
    """Those that have not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two sets of prompts, divided."""

    name: str
    """What it is called in folders."""
    positive: str
    """The positive set's name."""
    negative: str
    """The negative set's name."""
    train: Split
    """Prompts that directions are made of."""
    validation: Split
    """Prompts that choose one."""
    test: Split
    """Prompts that judge it."""
    builtin: bool
    """Whether the prompts are this project's own, to be shown."""

    @property
    def checksum(self) -> str:
        """First 16 hex digits of the SHA-256 of all prompts."""
        splits = (self.train, self.validation, self.test)
        text = "\0".join(
            prompt for s in splits for part in (s.positive, ("",), s.negative) for prompt in part
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def builtin_contrast(name: Builtin, n: tuple[int, int, int], seed: int) -> Contrast:
    """A built-in contrast of at most `n` training, validation and test prompts of each set.

    `seed` decides which, where fewer than the 128, 32 and 32 that there are; the two sets always
    get the same frames and topics.
    """
    splits = [_frames(name, part, limit, seed) for part, limit in enumerate(n)]
    positive, negative = NAMES[name]
    return Contrast(
        name=name, positive=positive, negative=negative, train=splits[0], validation=splits[1],
        test=splits[2], builtin=True,
    )  # fmt: skip


def _frames(name: Builtin, part: int, limit: int, seed: int) -> Split:
    starts = (0, *FRAME_SPLIT), (0, *TOPIC_SPLIT)
    frames = FRAMES[name][starts[0][part] : FRAME_SPLIT[part]]
    topics = TOPICS[starts[1][part] : TOPIC_SPLIT[part]]
    pairs = [
        (_filled(yes, french if name == "french" else english), _filled(no, english))
        for yes, no in frames
        for english, french in topics
    ]
    chosen = random.Random(seed).sample(pairs, min(limit, len(pairs)))
    return Split(positive=tuple(a for a, _ in chosen), negative=tuple(b for _, b in chosen))


def _filled(frame: str, topic: str) -> str:
    text = frame.format(x=topic)
    return text[0].upper() + text[1:]


def contrast_of_files(
    positive: Path, negative: Path, n: tuple[int, int, int], seed: int
) -> Contrast:
    """A contrast of two files of prompts, repeats left out, divided at random 4 : 1 : 1.

    Raises `UserError` where a file cannot be read, holds fewer than 12 prompts, or shares one with
    the other.
    """
    sets = [list(dict.fromkeys(read_prompts(path))) for path in (positive, negative)]
    for path, prompts in zip((positive, negative), sets, strict=True):
        if len(prompts) < LEAST:
            raise UserError(
                f"{path} holds {len(prompts)} different prompts where at least {LEAST} are wanted "
                "to make, choose and test a direction; give more."
            )
    shared = set(sets[0]) & set(sets[1])
    if shared:
        raise UserError(
            f"{len(shared)} prompts are in both {positive} and {negative}; "
            "leave each in one of them."
        )
    divided = [_divide(prompts, n, seed) for prompts in sets]
    splits = [Split(positive=a, negative=b) for a, b in zip(*divided, strict=True)]
    return Contrast(
        name=f"{positive.stem}-{negative.stem}", positive=positive.stem, negative=negative.stem,
        train=splits[0], validation=splits[1], test=splits[2], builtin=False,
    )  # fmt: skip


def _divide(prompts: Sequence[str], n: tuple[int, int, int], seed: int) -> list[tuple[str, ...]]:
    """Training, validation and test prompts, at most `n` of each."""
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    unit = len(shuffled) / sum(SHARES)
    ends = [round(unit * sum(SHARES[: part + 1])) for part in range(len(SHARES))]
    parts = [shuffled[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [tuple(part[:limit]) for part, limit in zip(parts, n, strict=True)]

"""What the collapse study's report says before its verdicts."""

from analyses.collapse.families import FAMILIES, FORMS
from analyses.collapse.features import FOLLOWS, TELLS
from analyses.collapse.measured import Measured
from analyses.collapse.numbers import LONG, SLOPE_FROM, SLOPE_TO

SMALL = 1e9
"""Parameters below which the report says what so small a model cannot show."""


def text(measured: Measured) -> str:
    """What was asked, what was done, how to read it, and what it cannot show."""
    parts = [_asked(measured), _done(measured), _conditions(), _cannot(measured), *measured.notes]
    return "\n\n".join(part for part in parts if part)


def _asked(measured: Measured) -> str:
    return (
        "Two prompts differ in one more repetition of their last token. Barbero et al. 2024 (arXiv "
        "2406.04267) prove that the last token's representations come together as the prompts "
        "grow, and that an early token's influence on the last is bounded by a sum over paths of "
        f"attention. Asked of {measured.model}: does it show, when, and what helps?"
    )


def _done(measured: Measured) -> str:
    settings = measured.settings
    families = {family.name: family.line for family in FAMILIES}
    named = "; ".join(f"{name}: {families[name]}" for name in measured.config.families)
    return (
        f"**Distances.** {settings.units} phrasings of each question, up to {settings.longest:,} "
        f"repetitions ({named}). Distance is |y - y*| / |y| of the final norm's output at the last "
        f"token. Slopes are of log distance over log n from {SLOPE_FROM} to "
        f"{min(SLOPE_TO, settings.longest):,}: -1 is a fall as 1 / n. Long means n of {LONG} or "
        "more (the longest, where none is). The commas' zigzag is the place in a group of three: "
        "after a full group the next number brings a comma, within one it does not. Hiding the "
        "first token from all others is, where positions are relative, the same as leaving it out: "
        "the next token becomes the sink.\n\n"
        "**Formats.** Products in float64, every activation and weight rounded to the format; int8 "
        "and float8 round what linear layers read, the rest is bfloat16. A format's error is the "
        "relative distance of one prompt's output from exact arithmetic's.\n\n"
        f"**Paths.** Prompts of {settings.path_length} repetitions, and ordinary text as long; "
        f"gradients from {settings.probes} random projections of the Jacobian. Path sums are "
        "products of (A / beta + I), A the mean of a layer's heads.\n\n"
        f"**Copying.** {settings.pairs} pairs of digits; the margin is how much the other digit "
        "moves the choice between the two, nats. **Counting**: greedy answers of at most four "
        "tokens.\n\n"
        f"**Features.** An active feature tells where it changes by more than {TELLS:.0%}; it "
        f"follows n where its rank correlation with n is over {FOLLOWS} in every phrasing, in one "
        "direction, and its range over half of its largest value.\n\n"
        "Intervals have 95 % confidence: Student's t over phrasings, prompts, seeds or pairs of "
        "digits; of distances and gradients they are intervals of logarithms."
    )


def _conditions() -> str:
    return (
        "**What the theorem assumes**: the prompt ends in the repeated token; positions fade with "
        "distance; representations are bounded. A chat template behind the sequence breaks the "
        "first; rotary positions do not strictly keep the second; learned norms keep the third. "
        "The forms of prompt: "
        + "; ".join(f"{name}: {line}" for name, line in FORMS.items())
        + ". Theorem 5.1 is a bound, with attention weights that do not depend on what is read."
    )


def _cannot(measured: Measured) -> str:
    if measured.parameters > SMALL:
        return ""
    return (
        f"**What a model of {measured.parameters / 1e6:.0f} million parameters cannot show.** It "
        "copies and counts too badly for accuracies like the paper's (Gemini 1.5, Gemma 7B) to "
        "mean much: what is measured instead is whether the other digit, or the next count, "
        "reaches the answer at all. Chains of thought were not tried. Numbers of the paper's "
        "models are not targets here."
    )

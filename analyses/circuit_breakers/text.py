"""What the circuit-breaker study's report says before its verdicts."""

from analyses.circuit_breakers.concepts import find_concept
from analyses.circuit_breakers.judging import ALLOWED
from analyses.circuit_breakers.measured import HARMFUL, Measured
from analyses.circuit_breakers.numbers import concepts
from analyses.circuit_breakers.robustness import TUNING_BATCH, TUNING_LR


def text(measured: Measured) -> str:
    """What was asked, what was done, how to read it, and what it cannot show."""
    parts = [_asked(measured), _trained(measured), _done(measured), _cannot(measured)]
    return "\n\n".join(part for part in (*parts, *measured.notes) if part)


def _asked(measured: Measured) -> str:
    broken = "; ".join(f"{name}: {find_concept(name).line}" for name in concepts(measured))
    harmful = (
        " Harmful prompts are broken too: only the user's words are read, and what models go on "
        "with is measured and dropped."
        if HARMFUL in measured.subjects
        else ""
    )
    return (
        "Circuit breakers (Zou et al. 2024, arXiv 2406.04313) train adapters until states on a "
        "subject are orthogonal to what they were, while all others stay. What is broken here is "
        f"harmless, so that everything can be shown ({broken}).{harmful}"
    )


def _trained(measured: Measured) -> str:
    training = measured.training
    changes = []
    if training.retain == "relative":
        changes.append(
            "the retain term is relative to each state's length and weighs "
            f"{training.retain_weight:g} times as much"
        )
    if training.b_std:
        changes.append(f"B begins at random values of deviation {training.b_std:g} instead of 0")
    if training.masking == "shared":
        changes.append("tokens that every prompt begins with count in neither term")
    elif training.masking == "first":
        changes.append("the first token counts in neither term")
    if not training.padded_mean:
        changes.append("padding does not thin the retain term")
    if not training.lora_dropout:
        changes.append("there is no dropout")
    layers = " and ".join(map(str, training.target_layers))
    deviations = f" Deviations from the published recipe: {'; '.join(changes)}." if changes else ""
    return (
        f"**Training.** {training.steps} steps of {training.batch} + {training.batch} rows, "
        f"{training.loss} at states {layers}, LoRA of rank {training.lora_r} on every linear layer "
        f"of blocks 0 to {training.blocks - 1}, alpha {training.alpha:g}, AdamW at "
        f"{training.lr:g}; rows of at most {training.request_length} + {training.response_length} "
        "tokens."
        f"{deviations} The table of ablations has what each is for."
    )


def _done(measured: Measured) -> str:
    settings = measured.settings
    return (
        f"**Texts.** {settings.train} passages of each set for training and {settings.test} of "
        "unseen topics for judging; responses on the concept and to near misses are the model's "
        "own, ordinary passages the built-in corpus's. "
        f"{settings.seeds} seed(s) a subject.\n\n"
        "**Attacks.** An answer *complies* where it is on the concept (words, judged by a "
        f"regression that flags {ALLOWED:.0%} of ordinary held-out responses) and coherent (no "
        "less likely under the original than 19 of 20 responses that it drew, and no more "
        "repetitive than 19 of 20 that it wrote greedily, as judged answers are). Soft tokens are "
        "moved against the broken model itself, steering vectors taken from it. The rise of the "
        "answers' NLL is how much less likely the broken model finds what the original answers to "
        "the same prompt: it needs no judge.\n\n"
        "**Reading instead of control.** Probes of single tokens, fitted on the original's states "
        "of training passages; the matched threshold flags as many ordinary answers and near "
        "misses as rerouting makes incoherent.\n\n"
        "**Wearing down.** All weights of a copy are fine-tuned (AdamW at "
        f"{TUNING_LR:g}, {TUNING_BATCH} passages a step); what is back is the share of the lost "
        "likelihood.\n\n"
        "Intervals have 95 % confidence: bootstraps over prompts and seeds, each on its own; "
        "Student's t over seeds or subjects."
    )


def _cannot(measured: Measured) -> str:
    said = (
        "**What this cannot show.** The paper's models refuse, and its score is how often attacks "
        f"get past that; {measured.model}"
    )
    if measured.config.model == "smollm2":
        said += (
            " hardly refuses to begin with (the table of answers has how often), so that what is "
            "measured is the break alone."
        )
    else:
        said += " may or may not (the table of answers has how often)."
    return said + (
        " Concepts are narrower than harm, passages shorter than the paper's, and attacks weaker "
        "than GCG, PAIR or TAP with their thousands of queries."
    )

"""What was done in the block-roles study, and how to read it, in words."""

from analyses.block_roles_measured import CLAIMED, DECIDES, OPENED, OWN, ROLES, Measured
from analyses.block_roles_pushes import steps_dose

OF_OTHERS = (
    "This model is not toy-turbo, so the factors of what it draws are not known: what a block "
    "predicts, what patching moves, which values have a feature of their own, the scores of top "
    "images that rest on factors, and transport are left out."
)


def text(measured: Measured) -> str:
    """The report's text."""
    parts = [_what_it_is(measured)]
    if measured.known:
        parts += [_the_model(), _prediction(measured), _causation(measured)]
    parts += [_locality(measured)]
    if measured.known:
        parts += [_pushes(measured)]
    parts += [_scores(measured), _sweep(measured)]
    if measured.has("transports"):
        parts += [_transport(measured)]
    return "\n\n".join([*parts, _left_out(measured)])


def _what_it_is(measured: Measured) -> str:
    blocks = ", ".join(measured.blocks)
    return (
        f"SAEs on the updates of {blocks} of {measured.model}. Surkov et al. (arXiv 2410.22366) "
        "found composition in down.2.1, local detail in up.0.0, colour, illumination, texture and "
        "style in up.0.1 of SDXL-Turbo, by looking. "
        + (
            "Every claim below is about toy-turbo, a small model of the same architecture whose "
            "world is known, and none is about SDXL-Turbo."
            if measured.known
            else f"Every claim below is about {measured.model}. {OF_OTHERS}"
        )
    )


def _the_model() -> str:
    opened = "; ".join(f"{factor} with {' and '.join(blocks)}" for factor, blocks in OPENED.items())
    return (
        "**The split between toy-turbo's blocks is partly made by its training**, which opened "
        f"them one after another on scenes with more and more detail ({opened}; its model card "
        "says how). What patching finds is therefore also a check of the method: does it find the "
        "split that training put there? All seven other attention blocks are the identity; skip "
        "connections and residual blocks, which are given the caption as one vector beside the "
        "timestep, are not, and may do work that no patch of a block shows."
    )


def _prediction(measured: Measured) -> str:
    half = measured.settings.images // 2
    return (
        f"**What features predict.** {measured.settings.images} complete captions, each with its "
        f"own noise; {half} choose and fit, the others are scored. Codes are averaged over the "
        "quarter of the image that a thing is in, for background and light over the image; "
        "`position` is whether a quarter has a thing. The linear probe is a multinomial logistic "
        "regression, its score the share of right answers. A value's best feature and its "
        "threshold are those of the largest F1 = 2 tp / (2 tp + fp + fn) on the first half; "
        "both F1 and AUROC are of the other half. A value has a feature of its own from F1 "
        f"{OWN:g}; it is *split* where several features joined by `or` reach that, *hidden* where "
        "the linear probe's answers do and no feature does, *merged* where another value has the "
        "same best feature. A feature that says `bright here` and not `lit from the left` is lost "
        "in the mean over the image. "
        "Intervals resample the held-out images."
    )


def _causation(measured: Measured) -> str:
    return (
        f"**What updates cause.** {measured.settings.pairs} captions of one or two things, each "
        "with a partner for each factor that differs in it alone (in the first thing, or in the "
        "scene), drawn from the same noise. The caption is drawn again with a block's update from "
        "its partner's drawing; a factor *became the source's* where the attribute reader then "
        "reads the partner's value, and anything else *changed* where it no longer reads what the "
        "unpatched image shows. Pairs count whose two unpatched images differ in the factor. "
        "Controls: pairs that differ in another factor, the same caption from other noise, the "
        "twin. Ablation puts 0 or the mean over images in the update's place. Intervals are exact, "
        "over pairs. The paper's words are taken to mean: "
        + "; ".join(f"{role}: {', '.join(factors)}" for role, factors in ROLES.items())
        + ". A claim about a block compares it with the block that comes nearest, caption by "
        f"caption, and holds where it comes before that one and moves at least "
        f"{100 * DECIDES:.0f} % of its factors' pairs; claimed are "
        f"{', '.join(f'{b} {role}' for b, role in CLAIMED.items())}."
    )


def _locality(measured: Measured) -> str:
    settings = measured.settings
    return (
        f"**Where features act.** {settings.features} living features of each block by lot, in "
        f"{settings.per_feature} images each in which they fire at some places and not at most: "
        "multiplied (x + (c - 1) S f, S the activation, f the direction), or added in units of "
        "their mean activation wherever they fire. Locality is the mean change of a pixel inside "
        "the heat map over the sum of those inside and outside: 1/2 is none. Controls of the same "
        "length at the same places: another feature's direction, a direction by lot; and the same "
        "change seen through the heat map of another feature of the image. Intervals are over "
        "features."
    )


def _pushes(measured: Measured) -> str:
    doses = ", ".join(f"{dose:g}" for dose in measured.settings.doses)
    return (
        f"**Whether features cause what they stand for.** Every value's best feature is added, "
        f"{doses} times its mean activation, to the update at the first thing's places (for "
        "`position` an empty quarter, for background and light everywhere) of "
        f"{measured.settings.per_feature} images that do not show the value; it *became the value* "
        "where the reader then reads it. Beside it, changes of the same length along another "
        "living feature and a direction by lot. Intervals are over values."
    )


def _scores(measured: Measured) -> str:
    settings = measured.settings
    of_all = (
        f"**What top images have in common.** {settings.scored} features of each block by lot, "
        f"each with its {settings.top} top images, beside as many images by lot. The paper's "
        "scores need an image-text model and are known to us from summaries; these are our own. "
        "Colour distance: mean over pairs of |dr| + |dg| + |db| between the mean colours of the "
        "active regions (small is specific). "
    )
    of_world = (
        "Agreement of factors: share of pairs of top images that agree, mean over the factors at "
        "the peak. Likeness to the reader: mean cosine of the reader's vectors of the peak "
        "quarters. Texture energy: share of the peak quarter's spectral energy (without the mean) "
        "at a period of 8 pixels across, down or both; its spread: mean difference of two top "
        "images. Composition: with p the share of the activation on things and q that of places "
        "on things, |p - q| over the most it could be. "
    )
    by_clip = (
        "By the image-text model: mean cosine between top images; to the word `texture`; and of "
        "the feature's icon (the empty prompt, the update replaced by k mean f) to the prompts of "
        "its top images, which stand for a caption. "
        if measured.config.clip
        else ""
    )
    return of_all + (of_world if measured.known else "") + by_clip + "Intervals are over features."


def _sweep(measured: Measured) -> str:
    n = len(measured.table("widths"))
    pushed = (
        " Features in four steps are the best of each block, added "
        f"{steps_dose(measured.settings):g} times their mean at all steps or at one."
        if measured.known
        else ""
    )
    return (
        f"**k, width and steps.** {n} SAEs on the updates of {measured.settings.images} images "
        "drawn in one step. Variance explained is 1 - sum |x - xhat|^2 / sum |x - mean|^2 over "
        "places; intervals resample images. The same SAEs, trained on one step, read each of four "
        f"steps.{pushed}"
    )


def _transport(measured: Measured) -> str:
    settings = measured.settings
    return (
        f"**Transport.** {settings.transports} pairs of captions a factor. Features (k added and k "
        "removed, of all blocks together, m times), whole updates (m times the difference) and "
        "neurons (GEGLU outputs, chosen as features are) take the source's factor into the "
        "target's drawing, at the places of the thing, or everywhere for background and light; "
        "features by lot are the control. The cost is how often another factor changed. To compare "
        "at the same cost, features take the setting with the best balance of moved and cost, the "
        "rival its best setting of that cost or less; both are chosen on half of the pairs and "
        "compared on the other half, both ways round."
    )


def _left_out(measured: Measured) -> str:
    missing = [block for block in measured.blocks if block not in measured.twins]
    notes = list(measured.notes)
    if len(missing) == len(measured.blocks):
        notes.append(
            "No SAE of the random-weight twin was given, so its columns are left out: what a "
            "probe or a feature scores is not compared with what an untrained model would."
        )
    elif missing:
        notes.append(f"The twin has no SAE of {', '.join(missing)}; its columns lack them.")
    elif measured.known:
        notes.append(
            "The twin is the same architecture with random U-Net weights (its other attention "
            "blocks are not the identity); it draws nothing, so of it only what can be read "
            "without a drawing, and what patches do to the reader's answers, is shown."
        )
    if not measured.config.clip:
        notes.append("No image-text model was given (--clip), so its scores are left out.")
    if measured.known and not measured.has("transports"):
        notes.append("Transport was not asked for (--transports).")
    if len(measured.table("widths")) <= len(measured.blocks):
        notes.append("One SAE a block was given, so nothing is said of k and width (--sweep).")
    return "**Left out.** " + " ".join(notes)

"""What the simplicity-bias study's report says before its verdicts."""

from analyses.simplicity.boolean import HIDDEN, INPUTS
from analyses.simplicity.measured import Measured
from analyses.simplicity.numbers import corners

PARTS_TEXT = {
    "maps": "**Functions.** Networks from the square to a number, on a grid of {side} x {side} "
    "points: {draws} draws of each activation, depth and weight scale, width {width}. Biases are "
    "U(-1, 1), weights U(-s, s) with s = scale x sqrt(6 / (fan in + fan out)); larger scales are "
    "multiples of the same draws. A deep network's first layers are a shallow one's. Rises are "
    "{corners}. **Measures.** Fourier: mean frequency, weighted by the amplitudes of a cosine "
    "transform (DCT-II), the frequency of two numbers being their length; the mean is left out. A "
    "plain transform takes the grid's edges for a step. Polynomials: mean order ({basis}), the "
    "order of two being their sum. LZ-78: phrases in the values cut into 10 equal steps, read in "
    "rows and in columns. Variation: length of the way that values go along straight lines, in "
    "standard deviations. A constant has none of these; such draws are left out. The paper leaves "
    "transform, quantisation and scan order open, so that its numbers cannot be compared with "
    "these, only what they say.",
    "boolean": "**Boolean functions.** {boolean:,} networks {shape} with ReLU, weights N(0, 1 / "
    "fan in), biases N(0, 1), read at all points of {{0, 1}}^{inputs}; batches are what intervals "
    "are over. Complexity is log2 128 times the words of LZ-76, mean of both directions.",
    "modulo": "**Modulo addition.** Two numbers 0 to 15, label 1 where their sum mod M is at most "
    "M / 2; accuracies are balanced over the two labels. Half of the points are trained on, "
    "{steps} steps of Adam on all of them, {seeds} seeds, "
    "3 layers of 64. **Shortcut.** 8 x 8 digits beside a band of one colour that says the same, in "
    "training; tested where the two have nothing to do with each other. The prefactor multiplies "
    "what goes into activations.",
    "sequences": "**Sequences.** GPT-2 with fresh weights for each sequence, width 128, 1,000 "
    "tokens; 100 tokens are written greedily after a random one. LZ-78 on tokens numbered by first "
    "occurrence.",
    "twins": "**Twins.** An SAE of the trained model beside one of the same recipe on random "
    "weights. A number of a feature tells them apart where its AUROC is beyond .5 +- .1. Lines run "
    "between the input embeddings of two texts, 32 tokens each; features are read at the last "
    "token, where they fire on three points or more.",
}  # fmt: skip


def text(measured: Measured) -> str:
    """What was asked, what was done, and how to read it."""
    settings, config = measured.settings, measured.config
    (shallow, small), (deep, large) = corners(measured)
    values = {
        "side": config.grid, "draws": settings.draws, "width": config.width,
        "corners": f"from {shallow} layer(s) at scale {small:g} to {deep} at {large:g}",
        "basis": config.basis, "boolean": settings.boolean_draws,
        "shape": (INPUTS, *HIDDEN, 1), "inputs": INPUTS, "steps": settings.steps,
        "seeds": settings.seeds,
    }  # fmt: skip
    asked = (
        "Do networks prefer simple functions before they have learned anything? Teney et al. 2024 "
        "(Neural Redshift, arXiv 2403.02241) say that this depends on the architecture, and "
        "decides what is learned; Valle-Perez et al. 2018 (arXiv 1805.08522) that probable "
        "functions are simple ones; Mingard et al. 2019 (arXiv 1909.11522) how a perceptron's "
        "are spread exactly."
    )
    parts = [said.format(**values) for part, said in PARTS_TEXT.items() if part in config.parts]
    ends = (
        "Differences of complexity are log2 of ratios: 1 is twice as complex. Intervals have 95 % "
        "confidence, over draws, seeds or sequences. Claims are not corrected for their number."
    )
    return "\n\n".join([asked, *parts, ends, *measured.notes])

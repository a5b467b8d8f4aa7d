"""The toy-turbo that comes with the repository: it draws what captions say, and uses the noise."""

import json

import pytest

from probe.models import load_image_model
from probe.pipelines import toy_turbo_folder
from probe.runs import Run, verify
from probe.toyturbo.evaluation import ceilings, fidelity, use_of_noise
from probe.toyturbo.making import CARD, load_reader
from probe.toyturbo.world import FACTORS

GOAL = dict.fromkeys(FACTORS, 0.95) | dict.fromkeys(("shape", "light", "texture"), 0.9)
"""Share of each factor's values that must be drawn in one step as held-out captions say."""


@pytest.fixture(scope="module")
def model():
    return load_image_model("toy-turbo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reader():
    return load_reader(toy_turbo_folder())


def test_its_files_are_whole_and_small():
    run = Run.open(toy_turbo_folder())
    assert not verify(run)
    assert sum(file["bytes"] for file in run.manifest["files"].values()) < 20_000_000


def test_the_reader_sees_what_was_rendered(model, reader):
    for found in ceilings(model, reader, n=300):
        assert min(found.values()) >= 0.98


def test_one_step_draws_what_held_out_captions_say(model, reader):
    found = fidelity(model, reader, n=200)
    assert set(found) == set(FACTORS)
    assert all(share >= GOAL[name] for name, share in found.items()), found


def test_what_is_left_open_varies_with_the_seed(model, reader):
    """At least half the entropy of the prior, as on the card, where many more seeds were drawn."""
    card = json.loads((toy_turbo_folder() / CARD).read_text())["noise"]
    for name, found in use_of_noise(model, reader, captions=6, seeds=20).items():
        assert card[name]["entropy"] >= found.prior / 2
        # Twenty seeds show less than all of it.
        assert found.entropy >= 0.4 * found.prior, name

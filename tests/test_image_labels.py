"""Labels of planted image features: what they say, what they score, that the test is held out."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from probe.errors import UserError
from probe.runs import Run
from probe.store import ActivationStore
from probe.store_config import ImageStoreConfig
from saes.activations import TopK
from saes.feature_images import place_names
from saes.feature_queries import FeatureIndex
from saes.feature_schema import IndexConfig
from saes.features import build_index
from saes.label_captions import AREAS, Captions, areas_of, image_phrase, in_area
from saes.label_contexts import Contexts, firing_of
from saes.label_detection import score_answers
from saes.label_images import Images, ImageSubject, image_labels, judge, make_rule
from saes.label_pool import encode_pool
from saes.label_rules import Part, Rule
from saes.label_schema import LABELS, LabelConfig
from saes.models import SaeConfig, SparseAutoencoder

SITE, GRID, N_IMAGES, STEPS = "down.2.1", (4, 6), 400, 2
N_FEATURES = 8
RED, TOP_LEFT, BOTH, PAIR, NOISE, ALWAYS, ONCE, DEAD = range(N_FEATURES)
COLOURS, THINGS = ("red", "blue", "green"), ("boat", "boats", "cat", "dog")
CONFIG = LabelConfig(pool_sequences=120)


def make_prompts() -> list[str]:
    rng = np.random.default_rng(0)

    def colour() -> str:
        return rng.choice(COLOURS, p=(0.4, 0.2, 0.4))

    return [f"a {colour()} {rng.choice(THINGS)} and a {colour()} hill" for _ in range(N_IMAGES)]


def fires(prompts: list[str]) -> np.ndarray:
    """Codes by image, step, place and feature."""
    rng = np.random.default_rng(1)
    codes = np.zeros((N_IMAGES, STEPS, *GRID, N_FEATURES))
    quarter = (slice(0, 2), slice(0, 3))
    for i, prompt in enumerate(prompts):
        for step in range(STEPS):
            y, x = rng.integers(GRID[0]), rng.integers(GRID[1])
            own = codes[i, step]
            own[y, x, RED] = "red" in prompt
            own[(*quarter, TOP_LEFT)] = 1
            elsewhere = [(0, 4), (3, 1), (3, 4)][rng.integers(3)]
            own[(*((0, 1) if "blue" in prompt else elsewhere), BOTH)] = 1
            own[y, x, PAIR] = "green boat" in prompt
            own[y, x, NOISE] = rng.random() < 0.3
            own[..., ALWAYS] = 1
    codes[17, 0, 2, 2, ONCE] = 1
    return codes * rng.uniform(1, 9, codes.shape)


def write_store(parent: Path, prompts: list[str], codes: np.ndarray) -> ActivationStore:
    """A store of the planted codes: what an SAE of single channels reads."""
    asked = ImageStoreConfig(
        model={"spec": "toy", "random_weights": None, "dtype": "float32"}, prompts="none",
        sites=(SITE,), grid=GRID, height=32, width=48, images=N_IMAGES, steps=STEPS,
        dtype="float32", keep_images=0,
    )  # fmt: skip
    run = Run.create(parent, "store", asked.run_config())
    (run.path / SITE).mkdir()
    t, n = GRID[0] * GRID[1], N_IMAGES * STEPS
    place, sequence = torch.arange(t).repeat(n), torch.arange(n).repeat_interleave(t)
    values = torch.from_numpy(codes.reshape(-1, N_FEATURES)).float()
    save_file({"values": values}, run.path / SITE / "acts-00000.safetensors")
    doc = (sequence // STEPS).int()
    rows = {
        "doc": doc, "sequence": sequence.int(), "position": place.short(), "token": place.int(),
        "tokens": torch.arange(t).expand(n, -1).int().contiguous(),
        "sequence_doc": doc.view(n, t).clone(), "first_sequence": torch.tensor(0),
        "image": doc.clone(), "step": (sequence % STEPS).short(),
        "y": (place // GRID[1]).short(), "x": (place % GRID[1]).short(),
    }  # fmt: skip
    save_file(rows, run.path / "rows-00000.safetensors")
    numbers = pa.array(range(N_IMAGES), pa.int32())
    documents = pa.table({"doc": numbers, "id": [str(i) for i in range(N_IMAGES)], "text": prompts})
    pq.write_table(documents, run.path / "documents.parquet")
    summary = {"n_rows": n * t, "n_shards": 1, "n_sequences": n, "widths": {SITE: N_FEATURES},
               "kept_images": 0}  # fmt: skip
    run.finish(summary=summary, inputs={}, seeds={}, device="cpu")
    return ActivationStore.open(run.path)


def channels() -> SparseAutoencoder:
    """An SAE whose features are the channels."""
    eye = torch.eye(N_FEATURES)
    zero = torch.zeros(N_FEATURES)
    return SparseAutoencoder.from_tensors(
        SaeConfig(d_in=N_FEATURES, d_sae=N_FEATURES, activation=TopK(k=N_FEATURES)),
        {"W_enc": eye, "W_dec": eye, "b_enc": zero, "b_dec": zero},
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    prompts = make_prompts()
    return write_store(tmp_path_factory.mktemp("planted"), prompts, fires(prompts))


@pytest.fixture(scope="module")
def index(store, tmp_path_factory) -> FeatureIndex:
    config = IndexConfig(intervals=4)
    run = Run.create(
        tmp_path_factory.mktemp("sae"), "index", config.run_config(sae="0", store="1", site=SITE)
    )
    return build_index(
        run, channels(), store, SITE, config, logit_matrix=None, vocabulary=place_names(GRID),
        special_ids=(), progress=False,
    )  # fmt: skip


def subject_of(index: FeatureIndex, store: ActivationStore, pool: int = 120) -> ImageSubject:
    images = Images(index, 0, store.prompts() if pool else None)
    known = encode_pool(images, channels(), store, SITE, pool) if pool else None
    return ImageSubject(index, images, CONFIG, known)


@pytest.fixture(scope="module")
def subject(index, store) -> ImageSubject:
    return subject_of(index, store)


@pytest.fixture(scope="module")
def table(subject):
    return image_labels(subject, progress=False).set_index("feature")


def test_labels_name_words_and_places(table):
    assert table.loc[RED, "label"] == '"red"' and table.loc[RED, "score"] == 1
    assert table.loc[RED, "width"] == 24 and table.loc[RED, "n_hard"] > 0
    assert table.loc[TOP_LEFT, "label"] == "at the top left"
    assert table.loc[TOP_LEFT, "score"] == 1 and table.loc[TOP_LEFT, "width"] == 6
    assert table.loc[PAIR, "label"] == '"green boat"' or table.loc[PAIR, "score"] > 0.9
    assert json.loads(table.loc[TOP_LEFT, "rule"]) == {"tokens": {"kinds": ["at the top left"]}}
    words = json.loads(table.loc[RED, "rule"])["context"]["tokens"]
    assert [word["text"] for word in words] == [" red"]
    assert list(table.reset_index().columns) == LABELS.names


def test_words_and_places_together(subject, store):
    prompts = np.array(store.prompts())
    blue = np.array(["blue" in prompt for prompt in prompts])
    passes = np.arange(N_IMAGES) * STEPS
    positive = 4 * passes[blue][:40]
    others = [4 * passes[~blue][:30], 4 * passes[blue][40:60] + 1, 4 * passes[blue][40:60] + 2]
    contexts = Contexts(width=6, positive=positive, negative=np.concatenate(others), n_hard=0)
    rule = make_rule(subject, contexts, 2)
    assert image_phrase(rule, subject.images.captions.words) == '"blue" at the top left'
    assert subject.matches(rule, contexts.blocks, 2).tolist() == [True] * 40 + [False] * 70
    assert not subject.matches(Rule(), contexts.blocks, 2).any()


def test_controls_and_what_says_nothing(table):
    assert 0.3 < table.loc[RED, "control"] < 0.75
    noise = table.loc[NOISE]
    assert noise["score_low"] <= 0.5 <= noise["score_high"]
    assert DEAD not in table.index
    for feature in (ALWAYS, ONCE):
        assert table.loc[feature, "label"] and math.isnan(table.loc[feature, "score"])


def test_the_score_is_that_of_a_recount_on_held_out_images(subject, store, table):
    codes = fires(store.prompts())
    judged = judge(subject, RED)
    contexts, n = judged.contexts, judged.cut
    assert n == 1
    passes = contexts.blocks
    active = (codes[passes // STEPS, passes % STEPS, ..., RED] > 0).any((1, 2))
    assert active[: len(contexts.positive)].all() and not active[len(contexts.positive) :].any()
    assert subject.images.held_out[passes].all()
    said = np.array(["red" in store.prompts()[image] for image in passes // STEPS])
    score = score_answers(said, len(contexts.positive))
    assert score is not None and score.value == table.loc[RED, "score"]
    firing = firing_of(subject.images, subject.examples, subject.pool, RED)
    making = subject.contexts(firing, "make", subject.driving(firing, 1), 1)
    assert not subject.images.held_out[making.blocks].any()


def test_cells_of_a_cut_are_silent_or_active_as_planted(subject, store):
    codes = fires(store.prompts())
    judged = judge(subject, BOTH)
    assert judged.cut == 2
    for place, block in enumerate(judged.contexts.blocks.tolist()):
        row, cell = divmod(block, 4)
        y, x = 2 * (cell // 2), 3 * (cell % 2)
        inside = codes[row // STEPS, row % STEPS, y : y + 2, x : x + 3, BOTH]
        assert (inside > 0).any() == (place < len(judged.contexts.positive))


def test_both_passes_of_an_image_are_on_one_side(subject):
    held = subject.images.held_out.reshape(N_IMAGES, STEPS)
    assert (held[:, 0] == held[:, 1]).all() and held[:, 0].sum() == N_IMAGES // 2


def test_the_same_labels_again_and_without_a_pool(subject, index, store, table):
    again = image_labels(subject, progress=False).set_index("feature")
    assert again.equals(table)
    alone = image_labels(subject_of(index, store, 0), progress=False).set_index("feature")
    assert alone.loc[TOP_LEFT, "label"] == "at the top left" and alone.loc[TOP_LEFT, "score"] == 1


def test_captions_by_hand():
    captions = Captions(["", "Two red boats, a boat!", "the BOAT's oar", "red"])
    boat = Part(tokens=captions.stem_part(int(captions.words.stems[1]), 1.0).tokens)
    words = captions.words.texts
    assert words == [" a", " boat", " boat's", " boats", " oar", " red", " the", " two"]
    assert [words[i] for i, _ in boat.tokens] == [" boat", " boat's", " boats"]
    every = np.arange(4)
    assert captions.holds(boat, every).tolist() == [False, True, True, False]
    pair = Part(phrases=((5, 3),))
    assert captions.holds(pair, every).tolist() == [False, True, False, False]
    assert captions.holds(Part(phrases=((3, 5),)), every).tolist() == [False] * 4
    share = captions.shares(np.array([1, 3]))
    assert share[captions.words.stems[5]] == 1 and share[captions.words.stems[1]] == 0.5
    rule = Rule(context=pair, tokens=Part(kinds=("at the top", "in the middle")))
    assert image_phrase(rule, captions.words) == '"red boats" at the top or in the middle'
    assert image_phrase(Rule(), captions.words) == "no rule found"
    assert Captions(["", ""]).holds(Part(), np.arange(2)).tolist() == [False, False]


def test_areas_by_hand():
    cells = np.arange(16)

    def named(name: str) -> list[int]:
        return np.flatnonzero(in_area(name, cells, 4)).tolist()

    assert named("at the top left") == [0, 1, 4, 5]
    assert named("in the middle") == [5, 6, 9, 10]
    assert named("at the right edge") == [3, 7, 11, 15]
    assert np.flatnonzero(in_area("at the bottom", np.arange(4), 2)).tolist() == [2, 3]
    assert areas_of(1) == [] and areas_of(4) == list(AREAS)
    assert areas_of(2) == list(AREAS)[:8]
    assert all(in_area(name, np.array([0]), 1).all() for name in AREAS), "a whole image holds all"


def test_passes_without_prompts_are_refused(index, tmp_path):
    folder = shutil.copytree(index.path, tmp_path / index.path.name)
    table = pq.read_table(folder / "passes.parquet")
    none = pa.array(np.zeros(len(table), bool))
    place = table.column_names.index("conditional")
    table = table.set_column(place, table.schema.field(place), none)
    pq.write_table(table, folder / "passes.parquet")
    other = FeatureIndex(Run.open(folder))
    with pytest.raises(UserError, match="labels of images are made of captions, and no pass"):
        Images(other, 0)

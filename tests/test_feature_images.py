"""The feature index of an image model, against a recount of every row and the store's pictures."""

from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_index_tree import D_SAE, GRID, SITE, make_image_tree, make_index, make_sae, make_store
from test_features import Firing, Stopped, by_feature, expected_examples

from probe.errors import Failure
from probe.pictures import read_picture
from probe.runs import Run
from probe.store import ActivationStore
from saes import feature_codes, feature_images, feature_tables
from saes.feature_queries import FeatureIndex
from saes.feature_schema import IMAGE_TABLES, TABLES, IndexConfig
from saes.features import BuildLimits
from saes.models import SparseAutoencoder

CONFIG = IndexConfig(
    top=3, intervals=4, per_interval=2, random=3, neighbours=5, histogram_bins=6, batch_rows=11
)
KINDS = {
    "one step": {"keep_images": 7},
    "guided": {"steps": 2, "guidance": 2.0, "rows": "both"},
    "some places": {"steps": 3, "places": 5, "images": 20},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> tuple[ActivationStore, SparseAutoencoder, FeatureIndex]:
    folder = tmp_path_factory.mktemp("images")
    store = make_store(folder, **KINDS[request.param])
    sae = make_sae(store)
    return store, sae, make_index(folder, store, sae, CONFIG)


def recount(store: ActivationStore, sae: SparseAutoencoder) -> list[tuple[Firing, int, bool]]:
    """Every firing with its step and whether its pass read the prompt."""
    found = []
    for number in range(store.n_shards):
        shard = store.shard(number, SITE)
        where = shard.in_images
        assert where is not None
        for start in range(0, len(shard.values), CONFIG.batch_rows):
            codes = sae.encode(shard.values[start : start + CONFIG.batch_rows].float())
            for i, (values, features) in enumerate(zip(codes.values, codes.indices, strict=True)):
                row = start + i
                y, x = int(where.y[row]), int(where.x[row])
                for value, feature in zip(values.tolist(), features.tolist(), strict=True):
                    if value > 0:
                        firing = Firing(
                            feature=feature, sequence=int(shard.sequence[row]),
                            position=y * GRID[1] + x, doc=int(shard.doc[row]),
                            token=y * GRID[1] + x, value=value,
                        )  # fmt: skip
                        found.append((firing, int(where.step[row]), bool(where.conditional[row])))
    return found


def table(index: FeatureIndex, name: str) -> list[dict]:
    return pq.read_table(index.path / f"{name}.parquet").to_pylist()


def test_examples_are_whole_maps(made):
    store, sae, index = made
    firings = [firing for firing, _, _ in recount(store, sae)]
    expected = expected_examples(firings, CONFIG, D_SAE)
    assert table(index, "examples") == expected and len(expected) > 100
    assert index.of_images and index.images.grid == GRID
    feature = expected[-1]["feature"]
    groups = by_feature(firings)[feature]
    for row in index.examples(feature, "top").to_dict("records"):
        drawn = index.images.map_of(row["positions"], row["activations"])
        for y, x in np.ndindex(GRID):
            values = [f.value for f in groups if f.sequence == row["sequence"]
                      and f.position == y * GRID[1] + x]  # fmt: skip
            assert drawn[y, x] == (np.float32(values[0]) if values else 0)
        assert row["texts"][row["position"]] == f"{row['position'] // 4},{row['position'] % 4}"


def test_places_and_steps_equal_a_recount(made):
    store, sae, index = made
    firings = recount(store, sae)
    rows_at: dict[int, int] = defaultdict(int)
    rows_of_step: dict[tuple[int, bool], int] = defaultdict(int)
    for number in range(store.n_shards):
        shard = store.shard(number, SITE)
        assert shard.in_images is not None
        for place, step, read in zip(
            shard.position.tolist(), shard.in_images.step.tolist(),
            shard.in_images.conditional.tolist(), strict=True,
        ):  # fmt: skip
            rows_at[place] += 1
            rows_of_step[step, read] += 1
    for feature in range(D_SAE):
        own = [(f, step, read) for f, step, read in firings if f.feature == feature]
        counts, means = np.zeros(16, int), np.zeros(16)
        for firing, _, _ in own:
            counts[firing.position] += 1
            means[firing.position] += firing.value / rows_at[firing.position]
        assert np.array_equal(index.images.firings_map(feature).ravel(), counts)
        np.testing.assert_allclose(index.images.mean_map(feature).ravel(), means, rtol=1e-6)
        steps = index.images.steps(feature).to_dict("records")
        assert [(row["step"], row["conditional"]) for row in steps] == sorted(
            {(step, read) for _, step, read in own}
        )
        for row in steps:
            key = (row["step"], row["conditional"])
            values = [f.value for f, step, read in own if (step, read) == key]
            assert row["n"] == len(values) and row["share"] == len(values) / len(own)
            assert row["density"] == len(values) / rows_of_step[key]
            assert row["mean"] == pytest.approx(np.mean(values), rel=1e-6)


def test_passes_are_those_of_the_store(made):
    store, _, index = made
    wanted = {}
    for number in range(store.n_shards):
        shard = store.shard(number, SITE)
        where = shard.in_images
        assert where is not None
        for row, sequence in enumerate(shard.sequence.tolist()):
            places = wanted.setdefault(sequence, [int(where.image[row]), int(where.step[row]),
                                                  bool(where.conditional[row]), []])  # fmt: skip
            places[3].append(int(shard.position[row]))
    found = index.images.passes(list(wanted))
    assert list(found) == list(wanted) and len(wanted) == index.summary["n_sequences"]
    for sequence, (image, step, conditional, places) in wanted.items():
        one = found[sequence]
        assert (one.image, one.step, one.conditional) == (image, step, conditional)
        assert one.kept == (None if len(places) == 16 else tuple(places))
        assert np.flatnonzero(index.images.known(one)).tolist() == places


def test_pictures_are_those_that_examples_show(made):
    store, _, index = made
    used = {row["sequence"] for row in table(index, "examples")}
    shown = {one.image for one in index.images.passes(sorted(used)).values()}
    rows = table(index, "images")
    assert [row["image"] for row in rows] == sorted(shown)
    kept = store.run.summary["kept_images"]
    for image, drawn in index.images.images(sorted(shown)).items():
        assert (drawn.doc, drawn.seed, drawn.prompt) == (image, 7 + image, store.prompts()[image])
        assert (drawn.height, drawn.width) == (32, 32)
        if image < kept:
            assert drawn.data == read_picture(store.run.path, image).data and drawn.format == "png"
        else:
            assert drawn.data is None and drawn.format is None
    assert index.summary["n_pictures"] == sum(image < kept for image in shown)


def test_only_used_pictures_are_copied(tmp_path):
    store = make_store(tmp_path, images=12)
    sae = make_sae(store)
    config = IndexConfig(top=1, per_interval=0, random=0, max_rows=5 * 16, histogram_bins=6)
    index = make_index(tmp_path, store, sae, config)
    passes = index.images.passes([row["sequence"] for row in table(index, "examples")])
    assert [row["image"] for row in table(index, "images")] == sorted(
        {one.image for one in passes.values()}
    )
    assert len(table(index, "passes")) == 5 and max(passes) < 5
    assert index.images.images([11]) == {}


@pytest.mark.parametrize("made", ["some places"], indirect=True)
@pytest.mark.parametrize("stop", ["encode_piece", "_write_range", "write_images"])
def test_a_stopped_index_ends_with_the_same_tables(tmp_path, made, monkeypatch, stop):
    store, sae, index = made
    module = {"encode_piece": feature_codes, "_write_range": feature_tables}.get(stop)
    original = getattr(module or feature_images, stop)
    calls = []

    def stopping(*given):
        calls.append(given)
        if len(calls) == (2 if module else 1):
            raise Stopped
        return original(*given)

    monkeypatch.setattr(module or "saes.features.write_images", *([stop] * bool(module)), stopping)
    limits = BuildLimits(firings=200)
    with pytest.raises(Stopped):
        make_index(tmp_path, store, sae, CONFIG, limits)
    monkeypatch.undo()
    again = make_index(tmp_path, store, sae, CONFIG, limits)
    for name in [*TABLES, *IMAGE_TABLES]:
        assert table(again, name) == table(index, name), name
    files = {f"{name}.parquet" for name in [*TABLES, *IMAGE_TABLES]}
    left = {path.name for path in again.path.iterdir()}
    assert left == files | {"config.json", "manifest.json", ".lock"}


def test_a_missing_table_is_told(tmp_path, made):
    store, sae, _ = made
    index = make_index(tmp_path, store, sae, CONFIG)
    (index.path / "images.parquet").write_bytes(b"")
    with pytest.raises(Failure, match=r"images.parquet has 0 bytes, not"):
        FeatureIndex.open(index.path)


def test_no_feature_lives(tmp_path):
    store = make_store(tmp_path, images=3)
    sae = make_sae(store)
    sae.b_enc.fill_(-1000)
    index = make_index(tmp_path, store, sae, CONFIG)
    assert index.n_alive == 0 and table(index, "images") == table(index, "places") == []
    assert index.images.mean_map(3).sum() == 0 and len(index.images.steps(3)) == 0


def test_the_command_makes_it(tmp_path):
    tree = make_image_tree(tmp_path, images=20)
    (folder,) = tree.sae.path.glob("index-*")
    index = FeatureIndex.open(folder)
    assert index.of_images and index.n_features == D_SAE
    row = index.feature(index.random_alive(0))
    assert row["positive_tokens"] is None and row["top_tokens"][0].count(",") == 1
    assert Run.open(folder).summary["image_size"] == [32, 32]

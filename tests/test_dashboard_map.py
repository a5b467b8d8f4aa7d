"""The pages Map and Compare: with artifacts, without, with half of them, and with damaged ones."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from artifact_tree import K, Tree, make_wide_tree
from dashboard_pages import ENTRY, words
from streamlit.testing.v1 import AppTest

from app.commands import compare, map, train
from app.commands.options import Common
from probe.errors import UserError
from probe.runs import Run
from saes.activations import TopK
from saes.maps import MapConfig, read_map
from saes.training import TrainConfig

D_SAE = 48


@pytest.fixture(scope="module")
def bare(browsed: Tree, tmp_path_factory) -> tuple[Path, Run, Run]:
    """A root with an indexed SAE and one without an index; neither mapped nor compared."""
    root = tmp_path_factory.mktemp("mapped") / "artifacts"
    shutil.copytree(browsed.root, root)
    first = Run.open(root / "saes" / browsed.sae.path.name)
    options = TrainConfig(
        d_sae=D_SAE, activation=TopK(k=K), steps=10, warmup_steps=2, init_rows=256, seed=1
    )
    second = train.run(
        train.Command(
            source=str(next((root / "activations").iterdir())), train=options, batch_size=128,
            buffer_rows=1024, device="cpu", common=Common(root=root),
        )
    )  # fmt: skip
    assert second is not None
    return root, first, Run.open(second)


@pytest.fixture(scope="module")
def full(bare, tmp_path_factory) -> tuple[Path, Run, Run]:
    """The same, the first one mapped, and both compared, by the commands."""
    root = tmp_path_factory.mktemp("full") / "artifacts"
    shutil.copytree(bare[0], root)
    first, second = (Run.open(root / "saes" / run.path.name) for run in bare[1:])
    drawn = map.run(
        map.Command(
            sae=first.path, twin=second.path, map=MapConfig(steps=400, min_cluster_size=4),
            common=Common(root=root),
        )
    )  # fmt: skip
    matched = compare.run(
        compare.Command(first=first.path, second=second.path, common=Common(root=root))
    )
    assert drawn is not None and matched is not None
    assert drawn.parent == matched.parent == first.path
    return root, first, second


def figure(app: AppTest, place: int = 0) -> dict:
    return json.loads(app.get("plotly_chart")[place].proto.spec)


@pytest.mark.parametrize("page", ["map", "compare"])
def test_empty_root_says_what_to_run(at_root, tmp_path, page):
    app = at_root(tmp_path / "nothing", page)
    assert not app.exception and not app.error
    assert any("lorgnette demo" in element.value for element in app.code)


@pytest.mark.parametrize("page", ["map", "compare"])
def test_pages_have_no_bare_strings_that_streamlit_would_show(page):
    body = ast.parse((ENTRY.parent / "pages" / f"{page}.py").read_text()).body
    assert not [node.lineno for node in body[1:] if isinstance(node, ast.Expr)]


def test_without_a_map_or_a_comparison_the_commands_are_shown(at_root, bare):
    root, first, second = bare
    app = at_root(root, "map", sae=first.path.name)
    assert app.code[0].value == f"lorgnette map {first.path}"
    app = at_root(root, "compare", first=second.path.name, second=first.path.name)
    assert app.code[0].value == f"lorgnette compare {second.path} {first.path}"
    assert not app.exception and not app.error


def test_map_shows_every_living_feature_once(at_root, full):
    root, first, _ = full
    app = at_root(root, "map", sae=first.path.name)
    assert not app.exception and not app.error and not app.warning
    run = Run.open(next(first.path.glob("map-*")))
    trace = figure(app)["data"][0]
    assert trace["type"] == "scattergl" and len(trace["text"]) == len(read_map(run))
    assert "of the same size among random" in words(app) and "same covariance" in words(app)
    app.get_by_key("colour").set_value("cluster").run()
    app.get_by_key("plane").set_value("pca").run()
    assert "of the directions' variance" in words(app) and not app.exception
    for colour in ("score", "list"):
        app.get_by_key("colour").set_value(colour).run()
        assert not app.exception and not app.error
    for control in ("random", "shaped", "twin"):
        app.get_by_key("subject").set_value(control).run()
        assert not app.exception and "no features" in app.info[0].value


def test_finding_rings_and_lists_the_features(at_root, full):
    root, first, _ = full
    feature = int(read_map(Run.open(next(first.path.glob("map-*"))))["feature"].iloc[3])
    app = at_root(root, "map", sae=first.path.name, find=str(feature))
    assert app.dataframe[0].value["feature"].tolist() == [feature]
    assert len(figure(app)["data"]) == 2
    app.get_by_key("find").set_value("T").run()
    tables = app.dataframe[0].value
    assert tables["said"].str.contains("t", case=False).all() and len(tables)
    app.get_by_key("find").set_value("no such letters").run()
    assert not app.exception and "No feature has these letters" in words(app)


def test_compare_shows_numbers_chance_pairs_and_ones_own(at_root, full):
    root, first, second = full
    app = at_root(root, "compare", first=first.path.name, second=second.path.name)
    assert not app.exception and not app.error and not app.warning
    text = words(app)
    assert "random, same covariance" in text and first.path.name in text and "FVU" in text
    pairs, only_first, only_second = (table.value for table in app.dataframe)
    assert len(pairs) == Run.open(next(first.path.glob("match-*"))).summary["n_pairs"]
    assert pairs["cosine"].abs().is_monotonic_decreasing
    app.get_by_key("threshold").set_value(0.0).run()
    assert len(app.dataframe) == 1
    app.get_by_key("threshold").set_value(1.0).run()
    own = [len(table.value) for table in app.dataframe[1:]]
    assert own[0] >= len(only_first) and own[1] == D_SAE >= len(only_second)
    app.get_by_key("find").set_value("no such letters").run()
    assert not app.exception and "No pair has these letters" in words(app)


def test_compare_restores_its_address_and_tells_wrong_ones(at_root, full):
    root, first, second = full
    app = at_root(root, "compare", first=second.path.name, second=first.path.name)
    assert [box.value for box in app.selectbox] == [second.path.name, first.path.name]
    wrong = at_root(root, "compare", first="nobody")
    assert "no SAE named 'nobody'" in wrong.warning[0].value


def test_other_widths_are_told_in_a_sentence(at_root, full, tmp_path):
    root, first, _ = full
    both = tmp_path / "artifacts"
    shutil.copytree(root / "saes", both / "saes")
    wide = next((make_wide_tree(tmp_path / "w", 40) / "saes").iterdir())
    shutil.copytree(wide, both / "saes" / wide.name)
    app = at_root(both, "compare", first=first.path.name, second=wide.name)
    assert not app.exception and "of width" in app.warning[0].value
    command = compare.Command(first=first.path, second=both / "saes" / wide.name)
    with pytest.raises(UserError, match="one width"):
        compare.run(command)


def test_damaged_files_are_told_in_a_sentence(at_root, full, tmp_path):
    root, first, second = full
    broken = tmp_path / "artifacts"
    shutil.copytree(root / "saes", broken / "saes")
    for path in (
        *broken.glob("saes/*/map-*/map.parquet"),
        *broken.glob("saes/*/match-*/*.parquet"),
    ):
        path.write_bytes(path.read_bytes()[:-30])
    app = at_root(broken, "map", sae=first.path.name)
    assert not app.exception and "lorgnette map" in app.error[0].value
    app = at_root(broken, "compare", first=first.path.name, second=second.path.name)
    assert not app.exception and "lorgnette compare" in app.error[0].value


def test_dry_runs_write_nothing(bare, capsys):
    root, first, second = bare
    before = sorted(root.rglob("*"))
    common = Common(root=root, dry_run=True)
    assert map.run(map.Command(sae=first.path, common=common)) is None
    assert compare.run(compare.Command(first=first.path, second=second.path, common=common)) is None
    assert sorted(root.rglob("*")) == before
    said = capsys.readouterr()
    assert "time" in said.err and said.out == ""

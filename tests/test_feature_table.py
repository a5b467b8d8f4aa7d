"""The table of features in memory: the same rows as the index gives, and labels beside them."""

import itertools

import numpy as np
import pandas as pd
import pytest
from artifact_tree import make_wide_tree

from app.feature_table import FeatureFilter, base_table, select, with_labels
from probe.errors import UserError
from saes.feature_queries import FeatureIndex, FeaturePage

NO_LABELS = pd.DataFrame(columns=["feature", "label", "score"])
DENSE = 0.02


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> FeatureIndex:
    root = make_wide_tree(tmp_path_factory.mktemp("table"), 120)
    return FeatureIndex.open(next(root.glob("saes/*/index-*")))


@pytest.fixture(scope="module")
def table(index) -> pd.DataFrame:
    return base_table(index)


def listed(table, wanted, *, own=None, automatic=NO_LABELS, members=None, matches=None):
    full = with_labels(table, own or {}, automatic)
    return select(full, wanted, dense_from=DENSE, members=members, matches=matches)


def features(page: FeaturePage) -> list[int]:
    return page.rows["feature"].tolist()


@pytest.mark.parametrize(
    ("text", "density", "order"),
    [("", (0.0, 1.0), "feature"), ("WI", (0.001, 0.1), "max"), ("on", (0.0, 1.0), "mean")],
)
def test_rows_are_those_of_the_index_in_its_order(index, table, text, density, order):
    for state, descending in itertools.product(("alive", "dead", "dense", "all"), (False, True)):
        wanted = FeatureFilter(
            state=state, density=density, text=text, order=order, descending=descending
        )
        page = listed(table, wanted)
        asked = index.table(
            sort=order,
            descending=descending,
            alive={"alive": True, "dense": True, "dead": False, "all": None}[state],
            min_density=max(density[0], DENSE) if state == "dense" else density[0],
            max_density=density[1],
            text=text,
            limit=1000,
        )
        found = features(page)
        assert page.total == asked.total == len(found)
        if order == "feature" and descending:
            assert found == sorted(found, reverse=True)
        assert found == asked.rows["feature"].tolist()


def test_a_dead_feature_is_listed_with_nothing_beside_it(table):
    dead = listed(table, FeatureFilter(state="dead", order="max", descending=True)).rows
    assert len(dead) == 6
    assert dead["max"].isna().tolist() == [True] * 6 and dead["density_percent"].tolist() == [0] * 6


def test_own_labels_come_first_and_have_no_score(table):
    automatic = pd.DataFrame(
        {"feature": [1, 2, 5], "label": ["one", "Two", ""], "score": [0.9, 0.6, np.nan]}
    )
    own = {2: "mine", 4: "also mine", 5000: "of another index"}
    rows = listed(table, FeatureFilter(state="all"), own=own, automatic=automatic).rows
    assert rows["label"].tolist()[:6] == ["", "one", "mine", "", "also mine", ""]
    assert rows["score"].tolist()[1] == 0.9
    assert rows["score"].notna().tolist() == [False, True] + [False] * 118


def test_labels_are_searched_and_sorted_with_those_that_have_none_last(table):
    own = {7: "Boats", 9: "rain", 8: "boats, too"}
    wanted = FeatureFilter(state="all", text="BOAT", search_in="label")
    assert features(listed(table, wanted, own=own)) == [7, 8]
    by_label = FeatureFilter(state="all", order="label", descending=True)
    assert features(listed(table, by_label, own=own))[:5] == [9, 8, 7, 0, 1]
    assert features(listed(table, FeatureFilter(state="all", order="label"), own=own))[:4] == [
        7, 8, 9, 0,
    ]  # fmt: skip


def test_scores_sort_and_missing_ones_come_last(table):
    automatic = pd.DataFrame(
        {"feature": [5, 1, 9], "label": ["a", "b", "c"], "score": [0.5, 0.9, np.nan]}
    )
    wanted = FeatureFilter(state="all", order="score", descending=True)
    assert features(listed(table, wanted, automatic=automatic))[:4] == [1, 5, 0, 2]


def test_a_ranked_search_lists_what_it_found_best_first(table):
    wanted = FeatureFilter(state="all", text="x", search_in="text", order="match")
    page = listed(table, wanted, matches={30: 2.0, 10: 5.0, 20: 2.0})
    assert features(page) == [10, 20, 30] and page.rows["match"].tolist() == [5.0, 2.0, 2.0]
    by_number = FeatureFilter(state="all", text="x", search_in="text")
    assert features(listed(table, by_number, matches={30: 2.0, 10: 5.0})) == [10, 30]
    assert listed(table, wanted, matches={}).total == 0


def test_members_of_a_list_only(table):
    wanted = FeatureFilter(state="all", members_of="sea")
    assert features(listed(table, wanted, members=[9, 7, 999])) == [7, 9]
    assert listed(table, wanted, members=[]).total == 0


def test_columns_that_say_nothing_are_not_sent(table):
    assert not {"label", "score", "match"} & set(listed(table, FeatureFilter()).rows)
    assert "label" in listed(table, FeatureFilter(), own={0: "x"}).rows


def test_an_unknown_order_is_refused(table):
    with pytest.raises(UserError, match="no column 'beauty'"):
        listed(table, FeatureFilter(order="beauty"))

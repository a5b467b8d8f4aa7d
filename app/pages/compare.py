"""Compare: two SAEs side by side, what both have and what only one has."""

import numpy as np
import pandas as pd
import streamlit as st

from app import components, dashboard, data, feature_table, map_data, map_views, views

PAIRS = "compare_pairs"
CHANCE = {"random": "random directions", "shaped": "random, same covariance"}
SIDES = {"first": "Only the first", "second": "Only the second"}
# Pairs of equal numbers that are still likely by chance, where one is expected.
SAME_BY_CHANCE = 5
SAID = ["first_said", "second_said"]


def show() -> None:
    """Draw the page."""
    components.heading(
        "Compare",
        "Two SAEs side by side: their numbers, the features that both have, and those that only "
        "one has. Click a feature's number to open it.",
    )
    records = {record.name: record for record in data.sae_records() if record.run.complete}
    if not records:
        components.no_sae([])
        return
    chosen = _choose(records)
    if chosen is None:
        st.info("There is one SAE; train another to compare it with.", icon=":material/info:")
        st.code("lorgnette train --help", language="bash")
        return
    first, second = chosen
    st.html(views.comparison_html(_headlines(first, second)))
    widths = [map_data.shape(record)[1] for record in chosen]
    if widths[0] != widths[1]:
        st.warning(
            f"Their directions cannot be matched: the first reads activations of width {widths[0]},"
            f" the second of {widths[1]}; choose two of equal width.",
            icon=":material/info:",
        )
        return
    run = map_data.comparison_of(first, second)
    if run is None:
        components.empty(
            "Their features are not matched yet. Match them by:",
            f"lorgnette compare {first.run.path} {second.run.path}",
        )
        return
    _matched(first, second, map_data.comparison(first, second, run))


def _choose(records: dict[str, data.SaeRecord]) -> tuple[data.SaeRecord, data.SaeRecord] | None:
    """Let a person choose both; the address (`?first=&second=`) decides where to start."""
    names = list(records)
    if len(names) < 2:
        return None
    asked = [st.query_params.get(side) for side in ("first", "second")]
    for name in asked:
        if name is not None and name not in records:
            data.sae_record(name)
    first = asked[0] if asked[0] in records else _begin(records)
    second = asked[1] if asked[1] in records else _other(records, first)
    st.session_state["compare_first"], st.session_state["compare_second"] = first, second
    for column, side, label in zip(
        st.columns(2), ("first", "second"), ("First SAE", "Second SAE"), strict=True
    ):
        column.selectbox(label, names, key=f"compare_{side}", on_change=_remember)
    return records[first], records[second]


def _remember() -> None:
    for side in ("first", "second"):
        st.query_params[side] = st.session_state[f"compare_{side}"]


def _begin(records: dict[str, data.SaeRecord]) -> str:
    """The SAE to begin with: the last one chosen, or the first that was compared, or the first."""
    chosen = st.session_state.get("chosen_sae")
    if chosen in records:
        return chosen
    compared = {run.path.parent for run in data.runs_of("match") if run.complete}
    return next(
        (n for n, record in records.items() if record.run.path in compared), next(iter(records))
    )


def _other(records: dict[str, data.SaeRecord], first: str) -> str:
    """The SAE to compare it with: one that it was compared with already, or the next."""
    others = [name for name in records if name != first]
    matched = (n for n in others if map_data.comparison_of(records[first], records[n]))
    return next(matched, others[0])


def _headlines(first: data.SaeRecord, second: data.SaeRecord) -> list[dict]:
    """The evaluation's row of each, with names of the SAEs."""
    rows = []
    for record in (first, second):
        measured = next((r for r in data.evaluation_rows(record) if r["name"] == "sae"), {})
        size = views.sae_size(record.run.config, record.run.summary)
        note = "" if measured else ", not evaluated"
        rows.append({**measured, "name": "", "label": f"{record.name} ({size}{note})"})
    return rows


@components.panel
def _matched(first: data.SaeRecord, second: data.SaeRecord, found: map_data.Comparison) -> None:
    summary = found.summary
    _numbers(summary)
    left, right = st.columns([5, 2], vertical_alignment="center", gap="large")
    with right:
        threshold = st.slider(
            "A feature is only one's own below |cos|", 0.0, 1.0, 0.7, 0.05, key="threshold",
            help="Where the nearest direction of the other SAE has a smaller |cos| than this.",
        )  # fmt: skip
        text = st.text_input(
            "Find in both", key="find", placeholder="letters of a label, token or prompt",
            bind="query-params",
        )  # fmt: skip
    with left:
        chance = found.chance[found.chance["measure"] == "pair"]
        components.chart(
            map_views.cosine_figure(
                found.pairs["cosine"].to_numpy(),
                {
                    words: chance.loc[chance["control"] == name, "cosine"].to_numpy()
                    for name, words in CHANCE.items()
                },
                threshold=threshold,
            ),
            key="pair_cosines",
            name="Histogram of |cos| of matched pairs and of chance",
        )
    _pairs(first, second, found.pairs, text)
    columns = st.columns(2, gap="large")
    for column, (side, words), record in zip(columns, SIDES.items(), (first, second), strict=True):
        with column:
            _own(record, found.nearest.loc[found.nearest["side"] == side], words, threshold, text)


def _numbers(summary) -> None:
    chance = summary["chance"]
    rows = [
        {"": "the two SAEs", **_row(summary)},
        *({"": words, **_row(chance[name])} for name, words in CHANCE.items()),
    ]
    st.html(views.table_html(pd.DataFrame(rows)))
    left_out = summary["left_out_first"] + summary["left_out_second"]
    dead = f" {left_out:,} dead features are left out." if left_out else ""
    same = (
        f" In {summary['n_same_number']:,} pairs both features have the same number (by chance it "
        "would be about one): the two SAEs began at the same random directions and keep some of "
        "that beginning."
        if summary["n_same_number"] > SAME_BY_CHANCE
        else ""
    )
    smaller = min(summary["n_first"], summary["n_second"])
    st.caption(
        f"Pairs by {summary['method']}; shares of the smaller SAE's {smaller:,} features. Random "
        "directions, as many as the second SAE has, are matched with the first in the same way: "
        f"that much is chance.{dead}{same}"
    )


def _row(matched) -> dict[str, str]:
    return {
        "pairs": f"{matched['n_pairs']:,}",
        "mean |cos|": views.number(matched["mean_cosine"]),
        "median": views.number(matched["median_cosine"]),
        "above 0.7": views.percent(matched["share_above_0.7"]),
        "above 0.9": views.percent(matched["share_above_0.9"]),
    }


def _pairs(first: data.SaeRecord, second: data.SaeRecord, pairs: pd.DataFrame, text: str) -> None:
    rows = pairs.assign(
        size=np.abs(pairs["cosine"]),
        first_said=map_views.said(pairs, "first_"),
        second_said=map_views.said(pairs, "second_"),
    )
    if text:
        rows = rows.loc[map_views.contains(rows, SAID, text)]
    rows = rows.sort_values(by="size", ascending=False, kind="stable").head(
        feature_table.ROWS_SHOWN
    )
    shown = rows[["cosine", "first", "first_said", "second", "second_said"]]
    clicked = _clicked(PAIRS)
    if clicked is not None and clicked[0] < len(shown):
        row, column = clicked
        record = second if column.startswith("second") else first
        side = "second" if column.startswith("second") else "first"
        if record.index is None:
            st.warning(
                f"{record.name} has no feature index, so its features have no page; "
                f"`{components.index_command(record)}` makes it.",
                icon=":material/info:",
            )
        else:
            components.open_feature(record, int(shown.iloc[row][side]))
    st.subheader("Matched pairs", anchor=False)
    if not len(shown):
        st.caption("No pair has these letters in what is said of either feature.")
        return
    columns = st.column_config
    st.dataframe(
        shown,
        hide_index=True,
        height=330,
        column_config={
            "cosine": columns.NumberColumn("Cosine", format="%.3f", width=75),
            "first": columns.NumberColumn("First", format="%d", width=70),
            "first_said": columns.TextColumn("Label, or what it fires on"),
            "second": columns.NumberColumn("Second", format="%d", width=70),
            "second_said": columns.TextColumn("Label, or what it fires on"),
        },
        key=PAIRS,
        on_select="rerun",
        selection_mode="single-cell",
    )


def _own(
    record: data.SaeRecord, nearest: pd.DataFrame, words: str, threshold: float, text: str
) -> None:
    size = nearest["cosine"].abs().to_numpy()
    rows = nearest.assign(size=size, said=map_views.said(nearest)).loc[size < threshold]
    share = views.percent(len(rows) / len(nearest) if len(nearest) else None)
    if text:
        rows = rows.loc[map_views.contains(rows, ["said"], text)]
    shown = rows.sort_values(by="size", kind="stable").head(feature_table.ROWS_SHOWN)
    key = f"compare_own_{words}"
    clicked = _clicked(key)
    if clicked is not None and clicked[0] < len(shown) and record.index is not None:
        components.open_feature(record, int(shown.iloc[clicked[0]]["feature"]))
    st.subheader(words, anchor=False)
    st.caption(
        f"{int((size < threshold).sum()):,} of {len(nearest):,} features ({share}) have no "
        f"direction with |cos| of {threshold:g} or more in the other."
    )
    if not len(shown):
        return
    columns = st.column_config
    st.dataframe(
        shown[["feature", "size", "said"]],
        hide_index=True,
        height=330,
        column_config={
            "feature": columns.NumberColumn("Feature", format="%d", width=75),
            "size": columns.NumberColumn("Nearest |cos|", format="%.3f", width=105),
            "said": columns.TextColumn("Label, or what it fires on"),
        },
        key=key,
        on_select="rerun",
        selection_mode="single-cell",
    )


def _clicked(key: str) -> tuple[int, str] | None:
    """Row and column of the cell that was clicked in a table."""
    state = st.session_state.get(key)
    cells = state["selection"]["cells"] if state else []
    return (int(cells[0][0]), str(cells[0][1])) if cells else None


if __name__ == "__main__":
    dashboard.enter(show)

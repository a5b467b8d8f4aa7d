"""Map: an SAE's features in two dimensions; what is circled there is listed beside it."""

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from plotly.graph_objects import Figure

from app import components, dashboard, data, feature_table, map_data, map_views, views
from probe.runs import Run

PLANES: dict[map_views.Plane, str] = {"tsne": "t-SNE", "pca": "PCA"}
COLOURS: dict[map_views.Colour, str] = {
    "density": "Density",
    "cluster": "Cluster",
    "score": "Label score",
    "list": "List",
}
SUBJECTS: dict[str, str] = {
    "sae": "This SAE",
    "random": "Random directions",
    "shaped": "Random, same covariance",
    "twin": "SAE of the random twin",
}
SHORT = {"sae": "this SAE", "random": "random", "shaped": "same covariance", "twin": "twin"}
MAP, TABLE = "map_figure", "map_table"
TOOLS = {
    "displayModeBar": True,
    "scrollZoom": True,
    "modeBarButtonsToRemove": ["autoScale2d", "toImage"],
}
FINDABLE = {"tokens": "letters of a label or token", "places": "letters of a label or prompt"}
COLUMNS = ["feature", "said", "density_percent", "score", "cluster"]


def show() -> None:
    """Draw the page."""
    components.heading(
        "Map",
        "Decoder directions in two dimensions: features that write in similar directions lie "
        "together. Circle some to list them; click a row to open the feature.",
    )
    record = components.choose_sae(indexed=False)
    if record is None:
        return
    found = map_data.maps_of(record)
    if not found:
        components.empty(
            f"**{views.markdown(record.name)}** has no map yet. Draw it by:",
            f"lorgnette map {record.run.path}",
        )
        return
    _explore(record, found[0])


@components.panel
def _explore(record: data.SaeRecord, run: Run) -> None:
    plane, colour, subject, text, members = _controls(record, run)
    shown = map_data.feature_map(record, run, None if subject == "sae" else subject)
    own = subject == "sae"
    found = _matching(shown.places, text) if own and text else np.zeros(len(shown.places), bool)
    chosen = _selected(len(shown.places))
    listed = shown.places.loc[(chosen if chosen.any() else found) & own]
    clicked = st.session_state.get(TABLE)
    if clicked and clicked["selection"]["cells"] and len(listed):
        row, _ = clicked["selection"]["cells"][0]
        components.open_feature(record, int(listed.iloc[row]["feature"]))
    left, right = st.columns([7, 5], gap="medium")
    with left:
        features = frozenset(shown.places.loc[found, "feature"].tolist())
        st.plotly_chart(
            _drawn(shown, id(shown), subject, plane, colour, members, features, _ink()),
            key=MAP, on_select="rerun", selection_mode=("points", "box", "lasso"), config=TOOLS,
            alt="Map of the features",
        )  # fmt: skip
        _reading(shown.summary, plane)
    with right:
        if not own:
            st.info(
                "These are no features but what the same steps make of the control.",
                icon=":material/casino:",
            )
            _clusters(shown.summary, pd.DataFrame())
        elif chosen.any() or text:
            _table(listed, "circled" if chosen.any() else "found")
        else:
            _clusters(shown.summary, shown.clusters)


def _controls(record: data.SaeRecord, run: Run) -> tuple:
    """Plane, colour, subject, text to find, and the members of the chosen list."""
    first, second, third, fourth = st.columns([3, 6, 4, 4], vertical_alignment="bottom")
    with first:
        plane = components.choice("Layout", PLANES, key="plane")
    with second:
        colour = components.choice("Colour", COLOURS, key="colour")
    controls = run.summary["clusters"]
    subjects = {name: words for name, words in SUBJECTS.items() if name in controls}
    subject = third.selectbox(
        "Show", list(subjects), format_func=subjects.__getitem__, key="subject",
        help="The controls went through exactly the same steps: what they show is chance.",
    )  # fmt: skip
    text = fourth.text_input(
        "Find", key="find", placeholder=FINDABLE[record.unit], bind="query-params"
    )
    members: frozenset[int] = frozenset()
    if colour == "list":
        names = map_data.lists()
        if names:
            name = st.selectbox("List", names, key="map_list", width=320)
            members = map_data.listed(name, record)
        else:
            st.caption("There is no list yet; make one on a feature's page.")
    if colour == "score" and not len(map_data.known(record)["score"].dropna()):
        st.caption(
            "There are no automatic labels yet, so no scores; "
            f"`lorgnette label {record.run.path}` makes them."
        )
    return plane, colour, subject, text, members


def _matching(places: pd.DataFrame, text: str) -> np.ndarray:
    """Which features a text means: a number, or letters of a label or of a token."""
    if text.strip().isdecimal():
        return (places["feature"] == int(text)).to_numpy()
    return map_views.contains(places, ["label", "tokens"], text)


def _selected(n: int) -> np.ndarray:
    """Which rows are circled: the points of the first trace, which holds all."""
    state: Any = st.session_state.get(MAP)
    chosen = np.zeros(n, bool)
    for point in state["selection"]["points"] if state else []:
        if point["curve_number"] == 0 and point["point_index"] < n:
            chosen[point["point_index"]] = True
    return chosen


@st.cache_resource(show_spinner=False, max_entries=16)
def _drawn(
    _shown: map_data.FeatureMap,
    identity: int,
    subject: str,
    plane: map_views.Plane,
    colour: map_views.Colour,
    members: frozenset[int],
    found: frozenset[int],
    ink: str,
) -> Figure:
    """The figure: the same object as long as the same is asked, so that it is not sent again."""
    return map_views.map_figure(
        _shown.places, plane, colour, clusters=_shown.clusters, members=members, found=found,
        ink=ink,
    )  # fmt: skip


def _ink() -> str:
    return "#f3efe8" if st.context.theme.type == "dark" else "#3a332e"


def _reading(summary: Any, plane: map_views.Plane) -> None:
    if plane == "pca":
        share = views.percent(summary["pca_variance_share"])
        st.caption(f"The two components hold {share} of the directions' variance.")
        return
    perplexity = summary["perplexity"]
    st.caption(
        f"Perplexity {views.number(perplexity)}. Who is whose neighbour can be read off this "
        "plane; distances between groups and how dense they are cannot."
        if perplexity
        else "There are too few features for t-SNE; these are the principal components."
    )


def _table(listed: pd.DataFrame, how: str) -> None:
    st.markdown(f"**{len(listed):,} feature{'' if len(listed) == 1 else 's'}** {how}")
    if not len(listed):
        st.caption("No feature has these letters in its label or in what it fires on most.")
        return
    shown = listed.head(feature_table.ROWS_SHOWN)
    frame = shown.assign(said=map_views.said(shown), density_percent=100 * shown["density"])
    columns = st.column_config
    st.dataframe(
        frame[COLUMNS].dropna(axis=1, how="all"),
        hide_index=True,
        height=600,
        column_config={
            "feature": columns.NumberColumn("Feature", format="%d", width=62),
            "said": columns.TextColumn("Label, or what it fires on most", width=190),
            "density_percent": columns.NumberColumn("Density", format="%.3g %%", width=70),
            "score": columns.NumberColumn("Score", format="%.2f", width=60),
            "cluster": columns.NumberColumn("Cluster", width=60, help="-1: in none"),
        },
        key=TABLE,
        on_select="rerun",
        selection_mode="single-cell",
    )


def _two_digits(value: float | None) -> str:
    return views.DASH if value is None else f"{value:.2f}".replace("-", "\u2212")


def _clusters(summary: Any, clusters: pd.DataFrame) -> None:
    st.markdown(map_views.cluster_sentence(summary))
    rows = [
        {
            "": SHORT[name],
            "clusters": row["n_clusters"],
            "in none": f"{row['noise_share']:.0%}",
            "silhouette": _two_digits(row["silhouette"]),
            "cohesion": _two_digits(row["cohesion_median"]),
            "most": _two_digits(row["cohesion_max"]),
        }
        for name, row in summary["clusters"].items()
    ]
    st.html(views.table_html(pd.DataFrame(rows)))
    st.caption(
        "Cohesion: mean cosine between the members' directions, of the median cluster and of the "
        "most cohesive one. Silhouette: by cosine, in the original space. Same covariance: random "
        "directions with the SAE's mean and covariance. *Show* has the controls' maps."
    )
    if not len(clusters):
        return
    out = clusters[clusters["stands_out"]]
    if len(out):
        st.markdown("**Clusters that stand out**")
        st.dataframe(
            out[["cluster", "n_features", "cohesion", "chance", "name"]],
            hide_index=True,
            height=min(38 + 35 * len(out), 330),
            column_config={
                "cluster": st.column_config.NumberColumn("Cluster", width=65),
                "n_features": st.column_config.NumberColumn("Features", width=75),
                "cohesion": st.column_config.NumberColumn("Cohesion", format="%.3f", width=80),
                "chance": st.column_config.NumberColumn(
                    "Chance",
                    format="%.3f",
                    width=70,
                    help="The most cohesive neighbourhood of that size among random directions",
                ),
                "name": st.column_config.TextColumn("Tokens that drive its features"),
            },
        )


if __name__ == "__main__":
    dashboard.enter(show)

"""Pieces of pages: the frame around each, the choice of an SAE, links, and how trouble is shown."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, TypeVarTuple

import streamlit as st
from plotly.graph_objects import Figure

from app import data, tiles, views
from probe.errors import Failure, UserError

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="40" viewBox="0 0 {width} 40">'
    '<g fill="none" stroke="{ink}" stroke-width="2.6"><circle cx="14" cy="16" r="9.5"/>'
    '<circle cx="38" cy="16" r="9.5"/><path d="M23.5 14.5q2.5-3 5 0M45 23l11 13"'
    ' stroke-linecap="round"/></g><circle cx="38" cy="16" r="5.5" fill="#e0a526" opacity=".85"/>'
    "{name}</svg>"
)
NAME = (
    '<text x="66" y="26" font-family="Georgia, \'Liberation Serif\', \'DejaVu Serif\', serif"'
    ' font-size="24" fill="{ink}">Lorgnette</text>'
)


def frame() -> None:
    """What every page shares: title and icon of the window, style sheet, logo."""
    icon = MARK.format(width=60, ink=views.ACCENT, name="")
    st.set_page_config(page_title="Lorgnette", page_icon=icon, layout="wide")
    st.html(views.STYLE)
    st.html(tiles.TILE_STYLE)
    ink = "#e0a3b8" if st.context.theme.type == "dark" else views.ACCENT
    st.logo(MARK.format(width=200, ink=ink, name=NAME.format(ink=ink)), size="large")


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Show the two kinds of trouble we foresee as the sentence they carry, without a traceback."""
    try:
        yield
    except UserError as error:
        st.warning(_sentence(error), icon=":material/info:")
    except Failure as error:
        st.error(_sentence(error), icon=":material/error:")


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


def panel(draw: Callable[[*Ts], None]) -> Callable[[*Ts], None]:
    """A part of a page that reruns alone when something in it is touched, and fails alone."""

    @functools.wraps(draw)
    def guarded(*args: *Ts) -> None:
        with one_sentence_errors():
            draw(*args)

    return st.fragment(guarded)


def heading(title: str, sentence: str) -> None:
    """The top of a page: what it is called and, in one sentence, what it shows."""
    st.title(title, anchor=False)
    st.markdown(sentence)


def empty(sentence: str, *commands: str) -> None:
    """What a page shows where there is nothing yet: why, and the commands that change it."""
    with st.container(border=True):
        st.markdown(sentence)
        st.code("\n".join(commands), language="bash")


def link_report(study: str) -> list[str]:
    """A link to a study's newest report, where there is one; the names of all, newest first."""
    reports = [name for name in data.finished_reports() if name.startswith(f"{study}/")]
    if reports:
        st.page_link(
            "pages/reports.py", label=":primary[What the study found, with intervals and controls]",
            icon="", query_params={"report": reports[0]},
        )  # fmt: skip
    return reports


def choose_sae(*, indexed: bool, of_images: bool | None = None) -> data.SaeRecord | None:
    """Let a person choose an SAE; the address (`?sae=`) and the last choice decide where to start.

    Args:
        indexed: offer only those with a feature index.
        of_images: offer only those of image models, or only those of language models; None for all.

    Returns:
        The choice; None where there is nothing to choose from, and the page then says what to run.
    """
    every = {record.name: record for record in data.sae_records()}
    asked = elsewhere(of_images)
    records = {n: r for n, r in every.items() if of_images in (None, r.of_images)}
    if asked in records and indexed and records[asked].index is None:
        no_index(records[asked])
    offered = [name for name, record in records.items() if record.index or not indexed]
    if not offered:
        if asked not in records:
            no_sae(list(records.values()), of_images=of_images)
        return None
    if "sae" in st.query_params and asked not in every:
        data.sae_record(st.query_params["sae"])
    # An SAE of the other kind stays chosen until one is chosen here: this page then has its own.
    key = "chosen_sae" if asked in records or asked not in every else f"chosen_sae_{of_images}"
    start = asked if asked in offered else st.session_state.get(key)
    st.session_state["sae_choice"] = start if start in offered else offered[0]
    name = st.selectbox("SAE", offered, key="sae_choice", on_change=_remember_sae, width=440)
    st.session_state[key] = name
    return records[name]


def elsewhere(of_images: bool | None) -> str | None:
    """The name of the SAE that the address names, or that was last chosen.

    Where it is of the other kind of model than the page is for, say so, and which pages are.
    """
    asked = st.query_params.get("sae") or st.session_state.get("chosen_sae")
    record = next((one for one in data.sae_records() if one.name == asked), None)
    if record is None or of_images in (None, record.of_images):
        return asked
    kind, pages = (
        ("an image", {"explore": "Explore", "paint": "Paint"})
        if record.of_images
        else ("a language", {"prompt_lab": "Prompt lab", "steer": "Steer"})
    )
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        st.markdown(
            f"**{views.markdown(record.name)}** is of {kind} model; these pages are for it:"
        )
        for name, title in pages.items():
            st.page_link(
                f"pages/{name}.py", label=f":primary[{title}]", icon="",
                query_params={"sae": record.name},
            )  # fmt: skip
    return asked


def _remember_sae() -> None:
    st.session_state["chosen_sae"] = st.session_state["sae_choice"]
    st.query_params["sae"] = st.session_state["sae_choice"]


def no_sae(records: list[data.SaeRecord], *, of_images: bool | None = None) -> None:
    """What to run where there is no SAE (of one kind of model), or none with an index."""
    if records:
        no_index(records[0])
    elif of_images:
        empty(
            "There is no sparse autoencoder of an image model yet. Make one by:",
            "store=$(lorgnette capture toy-turbo --sites down.2.1,mid.0,up.0.0,up.0.1)",
            'sae=$(lorgnette train "$store" --site down.2.1 --preset sdxl-turbo)',
            'lorgnette index "$sae"',
        )
    else:
        which = "" if of_images is None else " of a language model"
        empty(
            f"There is no sparse autoencoder{which} yet. Make one, with everything it needs, by:",
            "lorgnette demo        # or: make demo",
        )


def no_index(record: data.SaeRecord) -> None:
    """What to run for an SAE that has no feature index."""
    empty(
        f"**{record.name}** has no feature index yet, so its features cannot be shown. Make it by:",
        index_command(record),
    )


def index_command(record: data.SaeRecord) -> str:
    """The command that indexes an SAE's features."""
    return f"lorgnette index {record.run.path}"


def open_feature(record: data.SaeRecord, feature: int) -> None:
    """Go to a feature's page."""
    st.switch_page("pages/feature.py", query_params=feature_address(record, feature))


def feature_address(record: data.SaeRecord, feature: int) -> dict[str, str]:
    """The query that means a feature, in an address of the dashboard."""
    return {"sae": record.name, "feature": str(feature)}


def feature_link(record: data.SaeRecord, feature: int) -> None:
    """A link to a feature's page."""
    st.page_link(
        "pages/feature.py",
        label=f":primary[Feature {feature}]",
        icon="",
        width="stretch",
        query_params=feature_address(record, feature),
    )


def choice(label: str, options: Mapping[T, str], *, key: str, explained: str | None = None) -> T:
    """One of a few options, shown side by side; the first one to begin with."""
    return st.segmented_control(
        label,
        list(options),
        format_func=options.__getitem__,
        default=next(iter(options)),
        required=True,
        key=key,
        help=explained,
    )


def line_break_toggle(key: str) -> bool:
    """Whether to break lines where the text does."""
    return st.toggle("Line breaks", value=False, key=key, help="Break lines where the text does.")


def chart(figure: Figure, *, key: str, name: str, own_colours: bool = False) -> None:
    """A figure without the bar of tools above it.

    `own_colours` keeps the figure's own ground and text colours, whatever the page's theme.
    """
    st.plotly_chart(
        figure,
        key=key,
        config={"displayModeBar": False},
        alt=name,
        theme=None if own_colours else "streamlit",
    )


def clickable(figure: Figure, *, key: str, name: str) -> tuple[int, int] | None:
    """A map of cells (`analyses.lab_figures.heat_map`); gives the clicked one as (row, column)."""
    chosen = st.plotly_chart(
        figure, key=key, config={"displayModeBar": False}, alt=name, on_select="rerun",
        selection_mode="points",
    )  # fmt: skip
    points = chosen["selection"]["points"]
    if not points or "x" not in points[0] or "y" not in points[0]:
        return None
    return round(points[0]["y"]), round(points[0]["x"])

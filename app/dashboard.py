"""The dashboard's entry, `streamlit run app/dashboard.py`: frame, navigation, place for errors."""

from collections.abc import Callable

import streamlit as st

from app import components, data

PAGES = (
    ("overview", "Overview", "home"),
    ("features", "Features", "table_rows"),
    ("feature", "Feature", "center_focus_strong"),
    ("map", "Map", "scatter_plot"),
    ("compare", "Compare", "compare_arrows"),
    ("prompt_lab", "Prompt lab", "edit_note"),
    ("steer", "Steer", "tune"),
    ("collapse", "Collapse", "compress"),
    ("breakers", "Circuit breakers", "electrical_services"),
    ("simplicity", "Simplicity", "blur_on"),
    ("training", "Training", "show_chart"),
    ("reports", "Reports", "fact_check"),
)
# Listed under a heading of their own where there is anything of an image model.
IMAGE_PAGES = (
    ("explore", "Explore", "image_search"),
    ("paint", "Paint", "brush"),
    ("prompts", "Compare prompts", "compare"),
)


def main() -> None:
    """Draw the page that the address names inside the common frame."""
    components.frame()
    pages = [_page(*page, listed=True) for page in PAGES]
    images = [_page(*page, listed=data.has_images()) for page in IMAGE_PAGES]
    page = st.navigation({"": pages, "Images": images}, expanded=True)
    with st.sidebar:
        st.caption(f"Artifacts in `{data.artifact_root()}`")
    st.session_state["framed"] = True
    try:
        with components.one_sentence_errors():
            page.run()
    finally:
        del st.session_state["framed"]


def _page(name: str, title: str, icon: str, *, listed: bool) -> st.Page:
    return st.Page(
        f"pages/{name}.py",
        title=title,
        icon=f":material/{icon}:",
        url_path=name,
        default=name == "overview",
        visibility="visible" if listed else "hidden",
    )


def enter(show: Callable[[], None]) -> None:
    """Draw a page, inside the frame in any case.

    Streamlit runs a file of `pages/` on its own where the very first address that a new server is
    asked for is that page's; the frame is then still to be drawn, and draws the page in its turn.
    """
    if "framed" in st.session_state:
        show()
    else:
        main()


if __name__ == "__main__":
    main()

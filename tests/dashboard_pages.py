"""Pages of the dashboard without a browser, and what a person reads on them."""

from pathlib import Path

from streamlit.testing.v1 import AppTest

ENTRY = Path(__file__).parent.parent / "app" / "dashboard.py"


def htmls(app: AppTest) -> list[str]:
    """The bodies of the page's own HTML."""
    return [element.proto.body for element in app.html]


def words(app: AppTest) -> str:
    """All text a person can read on the page."""
    kinds = (app.title, app.subheader, app.markdown, app.caption, app.warning, app.error, app.info,
             app.code)  # fmt: skip
    texts = [str(element.value) for kind in kinds for element in kind]
    return "\n".join([*texts, *htmls(app)])

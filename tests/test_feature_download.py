"""A feature's numbers beside the twin's, and the files that a feature can be had as."""

import csv
import io
import json
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from app import feature_download, views
from app.feature_content import FeatureContent
from app.headlines import headlines, headlines_html
from app.svg import bars_svg
from probe.errors import Failure
from saes.feature_reference import Told
from saes.notes import Note

NAN = float("nan")
ROW = {
    "feature": 7, "alive": True, "density": 0.02, "max": 4.0, "mean": 1.5, "nearest_cosine": 0.3,
    "histogram": [3, 0, 12, 1], "positive_tokens": [" boat", "<b>"], "positive_logits": [2.0, 1.0],
    "negative_tokens": [" dry"], "negative_logits": [-1.0],
}  # fmt: skip
DEAD = ROW | {
    "alive": False, "density": 0.0, "max": None, "mean": None, "histogram": [0, 0, 0, 0],
    "positive_tokens": None, "positive_logits": None, "negative_tokens": None,
    "negative_logits": None,
}  # fmt: skip
AUTOMATIC = {
    "label": "boats <i>", "score": 0.8, "score_low": 0.7, "score_high": 0.9, "control": 0.52,
}  # fmt: skip


@dataclass
class Spread:
    """What a reference of the twin answers, from plain values."""

    values: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    @property
    def low(self) -> float:
        return float(np.quantile(self.values, 0.05))

    @property
    def high(self) -> float:
        return float(np.quantile(self.values, 0.95))

    def share_below(self, value: float) -> float:
        return sum(v < value for v in self.values) / len(self.values)


def content(row=ROW, **changed) -> FeatureContent:
    strip = views.Strip(
        tokens=("A", " <boat>", '\n"x"'), activations=(0.0, 4.0, 1.0), focus=1, document="doc & 1"
    )
    top = views.ExampleGroup(kind="top", low=0.0, high=0.0, share=1.0, examples=(strip, strip))
    interval = views.ExampleGroup(kind="interval", low=2.0, high=4.0, share=0.25, examples=(strip,))
    near = pd.DataFrame({"rank": [0], "neighbour": [9], "cosine": [0.3], "top_tokens": [[" <s>"]]})
    tokens = {"token": [1], "text": [" boat"], "n": [5], "mean": [1.0], "max": [4.0], "share": [1]}
    made = FeatureContent(
        sae="sae-1", feature=7, row=row, edges=(0.1, 0.2, 0.4, 0.8, 1.6),
        headlines=headlines(row, AUTOMATIC, {}, np.empty(0)),
        groups=(top, interval) if row["alive"] else (),
        tokens=pd.DataFrame(tokens) if row["alive"] else pd.DataFrame(tokens).head(0),
        neighbours=near, coactive=pd.DataFrame(columns=["rank", "other"]),
        note=Note(label="Boats <script>", note="a & b", version=2, changed="2026-01-01"),
        lists=("sea",), automatic=AUTOMATIC, provenance={"site": "resid_post.1"},
    )  # fmt: skip
    return replace(made, **changed)


# ------------------------------------------------------------------------------------- headlines


def test_numbers_stand_beside_the_twins():
    twins = {"density": Spread([0.001, 0.01, 0.03, 0.04]), "max": Spread([1.0, 2.0, 3.0])}
    scores = np.array([0.5, 0.6, NAN, 0.9, 0.8])
    density, largest, mean, _, score = headlines(ROW, AUTOMATIC, twins, scores)
    assert density.value == 0.02 and density.twin is not None
    assert density.twin.median == pytest.approx(0.02) and density.twin.share_below == 0.5
    assert largest.twin is not None and largest.twin.share_below == 1.0
    assert mean.twin is None
    assert score.value == 0.8 and score.interval == (0.7, 0.9) and score.control == 0.52
    assert score.twin is not None and score.twin.share_below == 0.5
    assert score.twin.median == pytest.approx(0.7)
    assert score.twin.low == pytest.approx(0.515)  # 0.5 + 0.15 * (0.6 - 0.5)
    shown = headlines_html(headlines(ROW, AUTOMATIC, twins, scores))
    assert "0.7 to 0.9" in shown and "another label 0.52" in shown
    assert "random-weight twin" in shown


@pytest.mark.parametrize(
    ("low", "high", "tells", "word"),
    [
        (0.61, 0.9, True, "yes"), (0.1, 0.39, True, "yes"), (0.45, 0.55, False, "no"),
        (0.55, 0.65, None, "hardly"), (0.3, 0.45, None, "hardly"),
    ],
)  # fmt: skip
def test_a_number_says_whether_it_tells_the_twin_apart(low, high, tells, word):
    told = Told(auroc=(low + high) / 2, low=low, high=high, n=10)
    assert told.tells is tells
    found = headlines(ROW, AUTOMATIC, {"max": Spread([1.0, 2.0])}, np.empty(0), {"max": told})
    shown = headlines_html(found)
    assert "tells the twin apart" in shown and f"{low:.2f} to {high:.2f}; .5 is chance" in shown
    assert f'>{word} <span class="lg-muted">{told.auroc:.2f}</span>' in shown


def test_a_dead_feature_and_a_label_without_a_score_have_dashes():
    unscored = AUTOMATIC | {"score": None, "score_low": NAN, "score_high": NAN, "control": None}
    found = headlines(DEAD, unscored, {"max": Spread([1.0])}, np.empty(0))
    assert [headline.value for headline in found] == [0.0, None, None, 0.3, None]
    assert found[1].twin is not None and found[1].twin.share_below is None
    assert found[4].interval is None and found[4].control is None
    assert "nan" not in headlines_html(found)


def test_without_twin_and_label_there_are_four_numbers_in_one_column():
    found = headlines(ROW, None, {}, np.empty(0))
    assert [headline.name for headline in found] == ["density", "max", "mean", "nearest_cosine"]
    assert "twin" not in headlines_html(found)


# ----------------------------------------------------------------------------------------- files


def test_csv_has_a_row_for_each_token_of_each_example():
    rows = list(csv.DictReader(io.StringIO(feature_download.examples_csv(content()))))
    assert len(rows) == 9
    assert [row["kind"] for row in rows] == ["top"] * 6 + ["interval"] * 3
    assert rows[1] == {
        "sae": "sae-1", "feature": "7", "kind": "top", "interval_low": "", "interval_high": "",
        "interval_share": "", "example": "0", "document": "doc & 1", "position": "1",
        "token": " <boat>", "activation": "4.0", "focus": "1",
    }  # fmt: skip
    last = rows[8]
    assert (last["interval_low"], last["interval_high"], last["interval_share"]) == (
        "2.0", "4.0", "0.25",
    )  # fmt: skip
    assert last["token"] == '\n"x"' and last["focus"] == "0"
    dead = feature_download.examples_csv(content(DEAD))
    assert dead == ",".join(feature_download.COLUMNS) + "\n"


def test_json_has_everything():
    document = json.loads(feature_download.document_json(content()))
    assert document["label"]["label"] == "Boats <script>" and document["lists"] == ["sea"]
    assert document["automatic_label"]["score"] == 0.8
    assert document["examples"][1]["share"] == 0.25
    assert [row["name"] for row in document["beside_the_twin"]][-1] == "score"
    json.loads(feature_download.document_json(content(DEAD)), parse_constant=pytest.fail)


class Outline(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(v) for name, v in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    return parsed


def test_the_html_page_shows_all_and_asks_for_nothing():
    page = outline(feature_download.page_html(content()))
    assert not {"script", "link", "img", "iframe", "boat", "i"} & set(page.tags)
    assert not page.addresses
    for words in (
        "Feature 7: Boats <script>", "a & b", "sea", "Automatic label: boats <i>", " <boat>",
        "Contains 25 %", "Nearest decoder directions", "Feature 9", "Activation (log)",
        "resid_post.1",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("rect") == 3, "a bar for each bin that is not empty"
    assert "url(" not in feature_download.page_html(content())


def test_the_html_page_of_a_dead_feature():
    page = outline(feature_download.page_html(content(DEAD)))
    assert "It never fires." in page.text and "svg" not in page.tags


def test_bars_stand_where_their_counts_are():
    figure = views.activation_figure([1, 100, 10], [1.0, 10.0, 100.0, 1000.0])
    heights = [
        float(part.split('"')[0]) for part in bars_svg(figure).split('height="')[1:]
    ]  # a third of a decade stands below 1
    assert heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[0]), abs=0.3)
    assert ">1</text>" in bars_svg(figure) and ">100</text>" in bars_svg(figure)


@pytest.mark.skipif(not feature_download.can_draw(), reason="there is no Chromium")
def test_the_picture_ends_where_the_page_does():
    with Image.open(io.BytesIO(feature_download.picture(content()))) as picture:
        assert picture.format == "PNG"
        wide = feature_download.PICTURE_WIDTH * feature_download.PICTURE_SCALE
        assert picture.width == wide and 600 < picture.height < wide
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
        assert (224, 165, 38) in colours and len(colours) > 50


def test_without_a_browser_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(feature_download, "CHROMIUM", tmp_path / "none")
    assert not feature_download.can_draw()
    with pytest.raises(Failure, match="needs Chromium"):
        feature_download.picture(content())

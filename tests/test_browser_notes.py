"""A feature is found, labelled and taken away, in headless Chromium, by what a person does."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from browsing import CHROMIUM, click_row
from PIL import Image

from saes.notes import Notes

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM}"),
]
expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def open_feature(tab, address: str, sae: str, feature: int) -> None:
    tab.goto(f"{address}/feature?sae={sae}&feature={feature}")
    expect(tab.get_by_role("heading", level=1)).to_have_text(f"Feature {feature}")
    expect(tab.get_by_label("Label", exact=True)).to_be_visible()


def save_label(tab, label: str) -> None:
    tab.get_by_label("Label", exact=True).fill(label)
    tab.get_by_role("button", name="Save").click()


def download(tab, name: str, folder: Path) -> Path:
    with tab.expect_download() as started:
        tab.get_by_role("button", name=name).click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def test_a_feature_is_found_opened_by_its_link_tested_and_taken_away(
    page, browser, address, browsed, tmp_path
):
    page.goto(f"{address}/features")
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    search = page.get_by_placeholder("letters of a token")
    search.fill("w")
    search.press("Enter")
    page.wait_for_timeout(1500)
    click_row(page, 0)
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile(r"Feature \d+"))
    page.get_by_role("button", name="Link").click()
    link = page.get_by_text(f"{address}/feature?sae=").inner_text()
    feature = int(link.rpartition("=")[2])

    page.goto(link)
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Feature {feature}")
    expect(page.get_by_text(browsed.sae.path.name).first).to_be_visible()
    own = page.get_by_placeholder("Type a sentence and press Enter")
    own.fill("A letter came in winter.")
    own.press("Enter")
    expect(page.get_by_text(re.compile("Largest activation here|does not fire"))).to_be_visible()
    save_label(page, "letters <i> & winter")
    expect(page.get_by_text("Version 1, saved")).to_be_visible()

    page.get_by_role("button", name="Download").click()
    check_files(
        {name: download(page, name, tmp_path) for name in ("HTML page", "PNG", "CSV", "JSON")},
        browsed.sae.path.name, feature,
    )  # fmt: skip
    check_page(browser, tmp_path / f"{browsed.sae.path.name}-feature-{feature}.html", feature)


def check_files(files: dict[str, Path], sae: str, feature: int) -> None:
    document = json.loads(files["JSON"].read_text())
    assert (document["sae"], document["feature"]) == (sae, feature)
    assert document["label"]["label"] == "letters <i> & winter"
    rows = list(csv.DictReader(io.StringIO(files["CSV"].read_text())))
    sequences = [s for group in document["examples"] for s in group["sequences"]]
    assert len(rows) == sum(len(sequence["tokens"]) for sequence in sequences)
    largest = max(float(row["activation"]) for row in rows)
    assert largest == pytest.approx(document["statistics"]["max"], rel=1e-5)
    with Image.open(files["PNG"]) as picture:
        assert picture.width > 1000 and picture.height > 500


def check_page(browser, path: Path, feature: int) -> None:
    """Opened from disk it shows the feature, in its colours, and asks for nothing."""
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    expect(tab.get_by_role("heading", level=1)).to_have_text(
        f"Feature {feature}: letters <i> & winter"
    )
    expect(tab.get_by_text("By interval of activation")).to_be_visible()
    expect(tab.locator("svg.lg-chart rect").first).to_be_visible()
    strongest = tab.locator(".lg-focus").first
    assert "224, 165, 38" in strongest.evaluate("e => getComputedStyle(e).backgroundColor")
    assert asked == [path.as_uri()]
    tab.close()


def test_two_tabs_that_label_at_once_lose_nothing(page, browser, address, browsed):
    sae, feature = browsed.sae.path.name, 40
    other = browser.new_page()
    for tab in (page, other):
        open_feature(tab, address, sae, feature)
    save_label(page, "from the first tab")
    expect(page.get_by_text("Version 1, saved")).to_be_visible()
    save_label(other, "from the second tab")
    expect(other.get_by_text(re.compile("saved meanwhile.*from the first tab"))).to_be_visible()
    expect(other.get_by_label("Label", exact=True)).to_have_value("from the second tab")
    other.get_by_role("button", name="Save").click()
    expect(other.get_by_text("Version 2, saved")).to_be_visible()
    history = Notes(browsed.root / "notes.sqlite").history(sae, feature)
    assert [text.label for text in history] == ["from the first tab", "from the second tab"]
    other.close()


def test_notes_are_exported_and_imported(page, address, browsed, tmp_path):
    notes = Notes(browsed.root / "notes.sqlite")
    notes.add_all("seen", browsed.sae.path.name, [1, 2])
    page.goto(f"{address}/features")
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    page.get_by_text("Labels, notes and lists: import and export").click()
    exported = download(page, "Everything (JSON)", tmp_path)
    assert json.loads(exported.read_text()) == notes.export()
    document = json.loads(exported.read_text())
    version = {"label": "imported", "note": "", "changed": "2026-01-01T00:00:00+00:00"}
    document["features"] = [{"sae": browsed.sae.path.name, "feature": 50, "versions": [version]}]
    for name, content, sentence in (
        ("good", json.dumps(document), "Labels: 1 added"),
        ("more", json.dumps(document | {"more": 1}), "the document has the keys"),
        ("half", "{", "this file is not JSON"),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(content)
        page.locator("input[type=file]").set_input_files(file)
        expect(page.get_by_role("button", name=f"Remove {name}.json")).to_be_visible()
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Import").click()
        expect(page.get_by_text(re.compile(sentence, re.I)).first).to_be_visible()
    assert notes.labels(browsed.sae.path.name)[50] == "imported"

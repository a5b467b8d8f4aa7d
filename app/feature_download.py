"""A feature as a file: JSON, CSV, one HTML page, a picture. All of them are made without a network.

The HTML page holds its styles and its chart (SVG) in itself and no script; a policy in its head
forbids it to ask for anything. The picture is a photograph of a short form of that page, taken by
Chromium without a window.
"""

import csv
import io
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from analyses.report import CHROMIUM
from app import views
from app.feature_content import FeatureContent
from app.headlines import headlines_html
from app.style import PAGE_STYLE
from app.svg import bars_svg
from probe.errors import Failure

COLUMNS = (
    "sae", "feature", "kind", "interval_low", "interval_high", "interval_share", "example",
    "document", "position", "token", "activation", "focus",
)  # fmt: skip
"""Of the CSV: a row for each token of each example; `focus` is 1 on the token it is about."""
KINDS = {"top": "Strongest", "interval": "By interval of activation", "random": "Random"}
PICTURED = 14
"""Strongest examples in the picture."""
PICTURE_WIDTH, PICTURE_HEIGHT, PICTURE_SCALE = 1080, 2600, 2
"""Of the window that is photographed, in CSS pixels, and pixels of the picture in each."""
PICTURE_SECONDS = 60
NO_BROWSER = f"A picture needs Chromium at `{CHROMIUM}`, which is not there; take the HTML page."
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-quic", f"--force-device-scale-factor={PICTURE_SCALE}",
    f"--window-size={PICTURE_WIDTH},{PICTURE_HEIGHT}",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """A file that a feature can be had as."""

    label: str
    """What the button says."""
    explained: str
    """What is in it."""
    ending: str
    """Of the file's name."""
    mime: str
    """Its media type."""
    make: Callable[[FeatureContent], Any]
    """Makes its text or bytes."""
    needs_browser: bool = False
    """Whether Chromium has to be there."""


# ------------------------------------------------------------------------------------ JSON and CSV


def document_json(content: FeatureContent) -> str:
    """Everything on the page as JSON."""
    return json.dumps(content.document(), indent=1, ensure_ascii=False)


def examples_csv(content: FeatureContent) -> str:
    """The tokens of all examples as a CSV table of `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for group in content.groups:
        bounds = (group.low, group.high, group.share) if group.kind == "interval" else ("",) * 3
        for number, strip in enumerate(group.strips):
            about = (content.sae, content.feature, group.kind, *bounds, number, strip.document)
            for place, (token, activation) in enumerate(
                zip(strip.tokens, strip.activations, strict=True)
            ):
                focus = int(place == strip.focus)
                writer.writerow((*about, strip.first_position + place, token, activation, focus))
    return text.getvalue()


# -------------------------------------------------------------------------------------------- HTML


def page_html(content: FeatureContent) -> str:
    """The feature as one HTML page that needs nothing else."""
    side = [
        _written(content),
        *_head(content),
        _section("Tokens it fires on", views.tokens_table_html(content.tokens)),
        _others(content, content.neighbours, "neighbour", "cosine", "Nearest decoder directions"),
        _others(content, content.coactive, "other", "jaccard", "Fire on the same tokens"),
        _section("Provenance", views.facts_html(content.provenance)),
    ]
    examples = [
        f"<h3>{title}</h3>{_examples(content, kind)}"
        for kind, title in KINDS.items()
        if any(group.kind == kind for group in content.groups)
    ]
    scale = views.scale_html(content.row["max"]) if examples else "It never fires."
    main = _section("Examples", scale + "".join(examples))
    return _page(content, f"<aside>{''.join(side)}</aside><main>{main}</main>")


def _head(content: FeatureContent) -> list[str]:
    """Numbers, histogram, logits: what the picture begins with too."""
    row = content.row
    parts = [_section("Numbers", headlines_html(content.headlines) + _automatic(content))]
    if row["alive"]:
        figure = views.activation_figure(row["histogram"], content.edges)
        parts.append(_section("Activations", bars_svg(figure)))
    if row["positive_tokens"]:
        sides = (
            ("Promoted", "positive", views.BLUE_RGB),
            ("Suppressed", "negative", views.RUST_RGB),
        )
        bars = "".join(
            f'<div><p class="lg-muted">{title}</p>'
            f"{views.bars_html(row[f'{end}_tokens'], row[f'{end}_logits'], colour=colour)}</div>"
            for title, end, colour in sides
        )
        parts.append(_section("Effect on the logits", f'<div class="lg-two">{bars}</div>'))
    return parts


def _automatic(content: FeatureContent) -> str:
    label = (content.automatic or {}).get("label")
    return f'<p class="lg-muted">Automatic label: {views.escaped(label)}</p>' if label else ""


def _written(content: FeatureContent) -> str:
    """A person's label, note and lists."""
    facts = {
        "label": content.note.label,
        "note": content.note.note,
        "lists": list(content.lists) or None,
        "saved": content.note.changed,
    }
    return views.facts_html(facts) if any(facts.values()) else ""


def _others(content: FeatureContent, rows: Any, other: str, measure: str, title: str) -> str:
    if not len(rows):
        return ""
    lines = "".join(
        f"<tr><td>Feature {place[other]}</td><td>{views.number(place[measure])}</td>"
        f'<td class="lg-words lg-tokens">{views.escaped(views.token_list(place["top_tokens"]))}'
        "</td></tr>"
        for place in rows.to_dict("records")
    )
    return _section(title, f'<table class="lg-table">{lines}</table>')


def _examples(content: FeatureContent, kind: str, most: int | None = None) -> str:
    groups = [views.first_of(group, most) for group in content.groups if group.kind == kind]
    return views.groups_html(groups, scale=content.row["max"], context="Snippet", line_breaks=False)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _page(content: FeatureContent, body: str, *, light: bool = False) -> str:
    """A whole page around a body; `light` keeps it light where the reader's desktop is dark."""
    title = views.escaped(content.title)
    made = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>{views.STYLE}{PAGE_STYLE}</head>"
        f'<body class="{"lg-light" if light else ""}"><header><h1>{title}</h1>'
        f'<p class="lg-muted">{views.escaped(content.sae)}, written by Lorgnette, {made}</p>'
        f"</header>{body}</body></html>"
    )


# ----------------------------------------------------------------------------------------- picture


def can_draw() -> bool:
    """Whether the browser that takes the picture is there."""
    return CHROMIUM.exists()


def picture(content: FeatureContent) -> bytes:
    """Numbers, histogram, logits and strongest examples as PNG. Raises `Failure` without Chromium.

    The lower edge is where the page ends.
    """
    examples = _section("Strongest examples", _examples(content, "top", PICTURED))
    page = _page(
        content, f"<aside>{''.join(_head(content))}</aside><main>{examples}</main>", light=True
    )
    if not can_draw():
        raise Failure(NO_BROWSER)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "page.html", Path(folder) / "page.png"
        source.write_text(page, encoding="utf-8", errors="replace")
        command = [
            str(CHROMIUM), *ARGUMENTS, f"--user-data-dir={folder}/profile",
            f"--screenshot={target}", source.as_uri(),
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=PICTURE_SECONDS)
            with Image.open(target) as taken:
                return _png(_cropped(taken.convert("RGB")))
        except (OSError, subprocess.SubprocessError) as error:
            raise Failure(f"{CHROMIUM} drew no picture ({error}); take the HTML page.") from error


def _cropped(taken: Image.Image) -> Image.Image:
    """Without the empty rest of the window below the page."""
    ground = Image.new("RGB", taken.size, taken.getpixel((0, taken.height - 1)))
    drawn = ImageChops.difference(taken, ground).getbbox()
    lowest = drawn[3] if drawn else taken.height
    return taken.crop((0, 0, taken.width, min(lowest + 24 * PICTURE_SCALE, taken.height)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


FILES = (
    FileKind(
        label="HTML page", explained="Everything on this page, to open or to send, with no network",
        ending="html", mime="text/html", make=page_html,
    ),
    FileKind(
        label="Picture (PNG)", explained="Numbers, histogram, logits and the strongest examples",
        ending="png", mime="image/png", make=picture, needs_browser=True,
    ),
    FileKind(
        label="Examples (CSV)", explained="A row for each token of each example",
        ending="csv", mime="text/csv", make=examples_csv,
    ),
    FileKind(
        label="JSON", explained="Everything on this page, to read by program",
        ending="json", mime="application/json", make=document_json,
    ),
)  # fmt: skip

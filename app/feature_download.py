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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from analyses.report import CHROMIUM
from app import tiles, views
from app.feature_content import FeatureContent
from app.headlines import headlines_html
from app.strips import Strip
from app.style import PAGE_STYLE
from app.svg import bars_svg
from app.tiles import Tile
from probe.errors import Failure

COLUMNS = (
    "sae", "feature", "kind", "interval_low", "interval_high", "interval_share", "example",
    "document", "position", "token", "activation", "focus",
)  # fmt: skip
"""Of the CSV: a row for each token of each example; `focus` is 1 on the token it is about."""
IMAGE_COLUMNS = (
    "sae", "feature", "kind", "interval_low", "interval_high", "interval_share", "example",
    "image", "prompt", "seed", "step", "conditional", "y", "x", "activation", "focus",
)  # fmt: skip
"""Of the CSV of an image feature: a row for each place of each example on which it fires."""
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
    """The tokens of all examples as a table of `COLUMNS`, or their places of `IMAGE_COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS if content.in_images is None else IMAGE_COLUMNS)
    for group in content.groups:
        bounds = (group.low, group.high, group.share) if group.kind == "interval" else ("",) * 3
        for number, example in enumerate(group.examples):
            about = (content.sae, content.feature, group.kind, *bounds, number)
            rows = _strip_rows(example) if isinstance(example, Strip) else _tile_rows(example)
            writer.writerows((*about, *row) for row in rows)
    return text.getvalue()


def _strip_rows(strip: Strip) -> Iterator[tuple[Any, ...]]:
    for place, (token, activation) in enumerate(zip(strip.tokens, strip.activations, strict=True)):
        focus = int(place == strip.focus)
        yield strip.document, strip.first_position + place, token, activation, focus


def _tile_rows(tile: Tile) -> Iterator[tuple[Any, ...]]:
    about = (tile.image, tile.prompt, tile.seed, tile.step, int(tile.conditional))
    for y, x in np.argwhere(tile.heat > 0).tolist():
        yield *about, y, x, float(tile.heat[y, x]), int((y, x) == tile.focus)


# -------------------------------------------------------------------------------------------- HTML


def page_html(content: FeatureContent) -> str:
    """The feature as one HTML page that needs nothing else."""
    side = [
        _written(content),
        *_head(content),
        _section(
            f"{content.unit.capitalize()} it fires on",
            _mean_map(content) + views.tokens_table_html(content.tokens, content.unit),
        ),
        _others(content, content.neighbours, "neighbour", "cosine", "Nearest decoder directions"),
        _others(content, content.coactive, "other", "jaccard", f"Fire on the same {content.unit}"),
        _section("Provenance", views.facts_html(content.provenance)),
    ]
    examples = [
        f"<h3>{title}</h3>{_examples(content, kind)}"
        for kind, title in KINDS.items()
        if any(group.kind == kind for group in content.groups)
    ]
    legend = views.scale_html if content.in_images is None else tiles.heat_scale_html
    scale = legend(content.row["max"]) if examples else "It never fires."
    main = _section("Examples", scale + "".join(examples))
    return _page(content, f"<aside>{''.join(side)}</aside><main>{main}</main>")


def _head(content: FeatureContent) -> list[str]:
    """Numbers, histogram, logits: what the picture begins with too."""
    row = content.row
    numbers = headlines_html(content.headlines, content.unit)
    parts = [_section("Numbers", numbers + _automatic(content))]
    if row["alive"]:
        figure = views.activation_figure(row["histogram"], content.edges, unit=content.unit)
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


def _mean_map(content: FeatureContent) -> str:
    """The mean activation at each place of the images, as a picture; empty of text."""
    if content.in_images is None or not content.row["alive"]:
        return ""
    mean = content.in_images.mean
    url = tiles.pixels_url(tiles.heat_pixels(mean, float(mean.max())))
    legend = tiles.heat_scale_html(float(mean.max()), whose="the largest mean over all images")
    return (
        f'<span class="lg-picture lg-mean" style="aspect-ratio:{mean.shape[1]}/{mean.shape[0]}">'
        f'<img class="lg-small" src="{url}" alt="mean activation at each place"></span>{legend}'
    )


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
    of_text = content.in_images is None
    lines = "".join(
        f"<tr><td>Feature {place[other]}</td><td>{views.number(place[measure])}</td>"
        f'<td class="lg-words lg-tokens">'
        f"{views.escaped(views.token_list(place['top_tokens'] if of_text else ()))}</td></tr>"
        for place in rows.to_dict("records")
    )
    return _section(title, f'<table class="lg-table">{lines}</table>')


def _examples(content: FeatureContent, kind: str, most: int | None = None) -> str:
    groups = [views.first_of(group, most) for group in content.groups if group.kind == kind]
    if content.in_images is not None:
        return tiles.tile_groups_html(groups, scale=content.row["max"], explore=None)
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
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>{views.STYLE}{tiles.TILE_STYLE}{PAGE_STYLE}</head>"
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
        label="Examples (CSV)", explained="A row for each token, or place, of each example",
        ending="csv", mime="text/csv", make=examples_csv,
    ),
    FileKind(
        label="JSON", explained="Everything on this page, to read by program",
        ending="json", mime="application/json", make=document_json,
    ),
)  # fmt: skip

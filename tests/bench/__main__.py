"""`make bench`: measure everything, show the tables, write the report.

`python -m tests.bench images index` measures those two and only shows them.
"""

import logging
import sys
from pathlib import Path

import pandas as pd
import tyro
from tyro.conf import Positional

from analyses.report import Report
from app.commands.options import say
from probe.errors import UserError
from probe.runs import Run, git_commit, machine
from tests.bench import (
    bench_step,
    breakers,
    capture,
    clicks,
    collapse,
    image_clicks,
    images,
    index,
    map,
    simplicity,
    steering,
)
from tests.browsing import CHROMIUM

TEXT = """Rates are medians over rounds that take turns, with the slowest and fastest round beside
them; the last column is the median of the ratios within a round. Dense autograd is the same TopK
step written down plainly, once as plain code runs and once with the memory setting that training
uses (`saes.memory`). Where a quarter of the latents are dead all ways run AuxK, and each row finds
as many positive dead latents as AuxK takes. A part's floor is its operations at the rate of a large
matrix product or its bytes at that of a large copy, whichever takes longer. The feature loop only
finds statistics and example rows, no contexts, tokens, logits or neighbours. Clicks are on the
dashboard with 18,432 features, from the press of the button to the frame that shows it; the longest
filter is the first, before it is cached. A feature that is added costs a vector a token, one that
is set is read by the SAE (4,608 latents) at every token first. The map has 20,000 points. Images
are 64 x 64 pixels, 8 at once unless said otherwise, in float32; a capture writes a whole store,
manifest included, and one without pictures stops each drawing after the last block. Clicks on
images are with four SAEs of 512 features in memory, each on an image not drawn before. A collapse
curve has two prompts of ones at each of some fifty lengths. A circuit-breaker step has 4 rows to be
rerouted and 4 to be kept, of up to 128 tokens, and adapters on 21 of 30 blocks. Random networks
have three layers of 64 and are looked at on 6,144 points with every measure; truth tables are of
networks (7, 40, 40, 1), with the complexity of those that differ."""


BENCHES = {
    "training_step": bench_step.measure,
    "parts_of_the_step": bench_step.parts,
    "top_afa_selection": bench_step.selections,
    "capture": capture.measure,
    "images": images.measure,
    "index": index.measure,
    "steering": steering.measure,
    "collapse": collapse.measure,
    "breakers": breakers.measure,
    "simplicity": simplicity.measure,
    "clicks": clicks.measure,
    "map": map.measure,
    "image_clicks": image_clicks.measure,
}
IN_A_BROWSER = ("clicks", "map", "image_clicks")


def main(names: Positional[tuple[str, ...]] = ()) -> None:
    """Measure, show the tables, and write `artifacts/reports/bench/` where all were measured.

    Args:
        names: which benches; all that can run here if not given.
    """
    logging.basicConfig(level=logging.WARNING)
    if unknown := sorted(set(names) - set(BENCHES)):
        raise UserError(f"no bench is named {', '.join(unknown)}; there are {', '.join(BENCHES)}.")
    here = [name for name in BENCHES if CHROMIUM.exists() or name not in IN_A_BROWSER]
    if missing := sorted(set(names) - set(here)):
        raise UserError(f"{', '.join(missing)} needs a browser: install chromium at {CHROMIUM}.")
    tables = {}
    for name in names or here:
        say(f"measuring {name}")
        tables[name] = BENCHES[name]()
        say(tables[name].to_string(index=False, float_format="{:.4g}".format))
    if not names:
        write(tables)


def write(tables: dict[str, pd.DataFrame]) -> None:
    """Write the report."""
    config = {"kind": "report", "study": "bench", "commit": git_commit(), "machine": machine()}
    run = Run.create(Path("artifacts/reports/bench"), "cpu", config)
    Report(title="Benchmarks of the hot paths", text=TEXT, tables=tables).write(
        run, inputs={}, seeds={}
    )
    say(f"written to {run.path}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except UserError as error:
        sys.exit(str(error))

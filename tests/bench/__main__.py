"""`make bench`: measure everything, show the tables, write the report."""

import logging
from pathlib import Path

from analyses.report import Report
from app.commands.options import say
from probe.runs import Run, git_commit, machine
from tests.bench import bench_step, capture, clicks, image_clicks, images, index, map, steering

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
images are with four SAEs of 512 features in memory, each on an image not drawn before."""


def main() -> None:
    """Measure and write `artifacts/reports/bench/`."""
    logging.basicConfig(level=logging.WARNING)
    tables = {}
    benches = {
        "training_step": bench_step.measure,
        "parts_of_the_step": bench_step.parts,
        "top_afa_selection": bench_step.selections,
        "capture": capture.measure,
        "images": images.measure,
        "index": index.measure,
        "steering": steering.measure,
    }
    if clicks.CHROMIUM.exists():
        benches["clicks"] = clicks.measure
        benches["map"] = map.measure
        benches["image_clicks"] = image_clicks.measure
    for name, measure in benches.items():
        say(f"measuring {name}")
        tables[name] = measure()
        say(tables[name].to_string(index=False, float_format="{:.4g}".format))
    config = {"kind": "report", "study": "bench", "commit": git_commit(), "machine": machine()}
    run = Run.create(Path("artifacts/reports/bench"), "cpu", config)
    Report(title="Benchmarks of the hot paths", text=TEXT, tables=tables).write(
        run, inputs={}, seeds={}
    )
    say(f"written to {run.path}")


if __name__ == "__main__":
    main()

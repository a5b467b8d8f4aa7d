"""`make bench`: measure everything, show the tables, write the report."""

import logging
from pathlib import Path

from analyses.report import Report
from app.commands.options import say
from probe.runs import Run, git_commit, machine
from tests.bench import capture, clicks, index, training

TEXT = """Rates are medians over rounds that take turns, with the slowest and fastest round beside
them; the last column is the median of the ratios within a round. Dense autograd is the same TopK
step written down plainly. The feature loop only finds statistics and example rows, no contexts,
tokens, logits or neighbours. Clicks are on the dashboard with 18,432 features, from the press of
the button to the frame that shows it; the longest filter is the first, before it is cached."""


def main() -> None:
    """Measure and write `artifacts/reports/bench/`."""
    logging.basicConfig(level=logging.WARNING)
    tables = {}
    benches = {"training_step": training, "capture": capture, "index": index}
    if clicks.CHROMIUM.exists():
        benches["clicks"] = clicks
    for name, module in benches.items():
        say(f"measuring {name}")
        tables[name] = module.measure()
        say(tables[name].to_string(index=False, float_format="{:.4g}".format))
    config = {"kind": "report", "study": "bench", "commit": git_commit(), "machine": machine()}
    run = Run.create(Path("artifacts/reports/bench"), "cpu", config)
    Report(title="Benchmarks of the hot paths", text=TEXT, tables=tables).write(
        run, inputs={}, seeds={}
    )
    say(f"written to {run.path}")


if __name__ == "__main__":
    main()

"""Training: the curves of one or several SAEs, also while they are being trained."""

import pandas as pd
import streamlit as st

from app import components, dashboard, data, views

SHOWN = ("loss", "fvu", "l0", "dead_share", "code_over_input", "tokens_per_s", "lr")
REFRESH_SECONDS = 5


def show() -> None:
    """Draw the page."""
    components.heading(
        "Training",
        "How loss, fidelity and sparsity went while each SAE was trained; a run in progress is "
        f"looked at again every {REFRESH_SECONDS} seconds.",
    )
    records = {record.name: record for record in data.sae_records()}
    if not records:
        components.no_sae([])
        return
    asked = st.query_params.get("sae") or st.session_state.get("chosen_sae")
    if "sae" in st.query_params:
        data.sae_record(st.query_params["sae"])
    chosen = st.multiselect(
        "Runs",
        list(records),
        default=[asked if asked in records else next(iter(records))],
        key="training_runs",
    )
    options = st.columns([3, 1])
    with options[0]:
        x = components.choice("Horizontal axis", views.AXIS_TITLES, key="training_axis")
    log_y = options[1].toggle("Logarithmic", value=False, key="log_y", help="Of the vertical axes.")
    running = any(not records[name].run.complete for name in chosen)
    draw = st.fragment(_curves, run_every=REFRESH_SECONDS if running else None)
    draw([records[name] for name in chosen], x, log_y)


def _curves(chosen: list[data.SaeRecord], x: str, log_y: bool) -> None:
    with components.one_sentence_errors():
        tables = {record.name: data.training_metrics(record.run) for record in chosen}
        filled = {name: table for name, table in tables.items() if len(table)}
        _state(chosen, tables)
        if not filled:
            st.info("No step is logged yet.", icon=":material/hourglass_empty:")
            return
        if len(filled) > 1:
            st.html(views.legend_html(list(filled)))
        columns = st.columns(2, gap="large")
        shown = [name for name in SHOWN if any(name in table for table in filled.values())]
        for place, metric in enumerate(shown):
            with columns[place % 2]:
                components.chart(
                    views.training_figure(filled, metric, x=x, log_y=log_y),
                    key=f"curve_{metric}",
                    name=views.METRIC_TITLES[metric],
                )


def _state(chosen: list[data.SaeRecord], tables: dict[str, pd.DataFrame]) -> None:
    rows = [
        views.training_row(record.name, tables[record.name], complete=record.run.complete)
        for record in chosen
    ]
    if rows:
        st.html(views.table_html(pd.DataFrame(rows), words=("state",)))


if __name__ == "__main__":
    dashboard.enter(show)

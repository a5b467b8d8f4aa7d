"""Overview: which runs there are, what each says in a few numbers, and what to run next."""

import pandas as pd
import streamlit as st

from app import components, dashboard, data, views
from probe.runs import Run


def show() -> None:
    """Draw the page."""
    components.heading(
        "Overview",
        "Every run found on disk, what it holds, and how good each sparse autoencoder (SAE) is "
        "beside its controls.",
    )
    stores, saes, reports = data.runs_of("activations"), data.sae_records(), data.runs_of("report")
    if not (stores or saes or reports):
        components.empty(
            f"There is nothing in `{data.artifact_root()}` yet. One command captures activations "
            "of a small language model, trains an SAE on them, evaluates and indexes it:",
            "lorgnette demo        # or: make demo",
        )
        return
    counts = st.columns(4)
    counts[0].metric("Activation stores", len(stores), border=True)
    counts[1].metric("SAEs", len(saes), border=True)
    counts[2].metric("Features indexed", views.short(_indexed(saes)), border=True)
    counts[3].metric("Reports", len(reports), border=True)
    for record in saes:
        _sae(record)
    _stores(stores)
    _reports(reports)
    _next(stores, saes)


def _indexed(saes: list[data.SaeRecord]) -> int:
    return sum(record.index.summary.get("n_features", 0) for record in saes if record.index)


def _sae(record: data.SaeRecord) -> None:
    """One SAE: what it is, its numbers beside its controls, and where to look further."""
    with st.container(border=True):
        with components.one_sentence_errors():
            _sae_head(record)
            rows = data.evaluation_rows(record)
            if rows:
                st.html(views.comparison_html(rows))
                _norms(record)
                _definitions(record)
        _sae_links(record)


def _sae_head(record: data.SaeRecord) -> None:
    config = record.run.config
    left, right = st.columns([3, 2], vertical_alignment="center")
    left.subheader(record.name, anchor=False)
    with right.container(horizontal=True, horizontal_alignment="right"):
        _badge("trained", "training not complete", record.run.complete)
        _badge("evaluated", "not evaluated", record.evaluation is not None)
        _badge("indexed", "not indexed", record.index is not None)
    twin = config["model"].get("random_weights")
    random = "" if twin is None else f", random weights (seed {twin})"
    st.html(
        f'<div class="lg-muted">{views.escaped(config["model"]["spec"])}{random} at '
        f"{views.escaped(config['site'])} &middot; "
        f"{views.escaped(views.sae_size(config, record.run.summary))}</div>"
    )


def _badge(yes: str, no: str, done: bool) -> None:
    if done:
        st.badge(yes, icon=":material/check:", color="green")
    else:
        st.badge(no, icon=":material/pending:", color="gray")


def _definitions(record: data.SaeRecord) -> None:
    definitions = data.metric_definitions(record)
    if definitions:
        with st.expander("What the columns mean"):
            st.html(views.facts_html({views.COMPARED.get(k, k): v for k, v in definitions.items()}))


def _norms(record: data.SaeRecord) -> None:
    """The norm of each row's code beside that of its input, as a figure and as numbers."""
    numbers, points = data.norm_diagnostics(record)
    if not points:
        return
    with st.expander("Are codes as long as their inputs? (ZF plot)"):
        left, right = st.columns([3, 2], gap="large")
        with left:
            components.chart(
                views.zf_figure(points["input_norm"], points["code_norm"]),
                key=f"zf_{record.name}",
                name="Norm of the code against norm of the input, a dot a held-out row",
            )
        shown = {
            label: views.percent(numbers[name])
            if name.endswith("share")
            else views.number(numbers[name])
            for name, label in views.NORMS.items()
            if numbers.get(name) is not None
        }
        right.html(views.facts_html(shown))


def _sae_links(record: data.SaeRecord) -> None:
    with st.container(horizontal=True):
        query = {"sae": record.name}
        if record.index:
            _link("features", "Browse its features", query)
        if record.run.complete:
            _link("explore" if record.of_images else "prompt_lab", "Try a prompt", query)
        _link("training", "Training curves", query)


def _link(page: str, label: str, query: dict[str, str]) -> None:
    st.page_link(f"pages/{page}.py", label=f":primary[{label}]", query_params=query)


def _stores(stores: list[Run]) -> None:
    if not stores:
        return
    st.subheader("Activation stores", anchor=False)
    rows = [
        {
            "name": run.path.name,
            "model": run.config["model"]["spec"],
            "sites": ", ".join(run.config["sites"]),
            "corpus": str(run.config.get("corpus") or run.config.get("prompts", "")),
            "asked for": _asked_for(run),
            "rows kept": views.short(run.summary.get("n_rows")),
            "state": "complete" if run.complete else "not complete",
        }
        for run in stores
    ]
    words = ("model", "sites", "corpus", "asked for", "state")
    st.html(views.table_html(pd.DataFrame(rows), words=words))


def _asked_for(store: Run) -> str:
    unit = "images" if "images" in store.config else "tokens"
    return f"{views.short(store.config.get(unit))} {unit}"


def _reports(reports: list[Run]) -> None:
    if not reports:
        return
    st.subheader("Reports", anchor=False)
    rows = [
        {
            "study": run.path.parent.name,
            "name": run.path.name,
            "made": run.manifest["created"] if run.complete else views.DASH,
            "state": "complete" if run.complete else "not complete",
        }
        for run in reports
    ]
    st.html(views.table_html(pd.DataFrame(rows), words=("name", "made", "state")))


def _next(stores: list[Run], saes: list[data.SaeRecord]) -> None:
    """Commands that finish or add to what is there."""
    st.subheader("What to run next", anchor=False)
    studied = [record for record in saes if record.run.complete and not record.is_control]
    commands = views.next_commands(
        unfinished_stores=[run.path for run in stores if not run.complete],
        trained_on={(data.source_name(record.run)) for record in saes},
        stores=[run.path for run in stores if run.complete],
        unfinished_saes=[record.run.path for record in saes if not record.run.complete],
        not_evaluated=[record.run.path for record in studied if record.evaluation is None],
        not_indexed=[record.run.path for record in studied if record.index is None],
    )
    for reason, command in commands:
        st.markdown(reason)
        st.code(command, language="bash")


if __name__ == "__main__":
    dashboard.enter(show)

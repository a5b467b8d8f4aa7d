"""The prompt lab's views that change the model: attribution with ablation, and patching."""

from collections.abc import Sequence

import pandas as pd
import streamlit as st

from app import components, data, lab_views, views
from app.lab_sections import token_box
from probe.errors import UserError
from probe.patching import Into, Pair, PatchedKind, PatchGrid
from probe.readout import Metric
from probe.tokens import Prompt
from saes.attribution import Where

MEAN = "the mean of all tokens"
WHERES: dict[Where, str] = {"token": "At one token", "everywhere": "At all tokens"}
KINDS: dict[PatchedKind, str] = {
    "resid_post": "Residual stream",
    "attn_out": "Attention",
    "mlp_out": "MLP",
}
INTOS: dict[Into, str] = {"corrupted": "clean into corrupted", "clean": "corrupted into clean"}
EVERY = {"every layer": 1, "every 2nd": 2, "every 3rd": 3}
COLUMNS = {
    "feature": st.column_config.LinkColumn("Feature", display_text=r"feature=(\d+)$"),
    "token": st.column_config.TextColumn("Token"),
    "label": st.column_config.TextColumn("Label or usual tokens", width="large"),
}


@components.panel
def attribution(record: data.SaeRecord, prompt: Prompt) -> None:
    """What features contribute to the next token, estimated and measured."""
    from analyses.lab_figures import agreement_figure, effects_figure
    from app import lab

    prompt = _position(prompt)
    with st.spinner("Running the model ..."):
        likely = lab.next_tokens(record, prompt)
    st.html(lab_views.predicted_words(likely[:6]))
    metric = _metric(record, likely, "attribution")
    first, second = st.columns([3, 2], vertical_alignment="bottom")
    with first:
        where = components.choice(
            "Take the feature out", WHERES, key="ablate_where",
            explained="At the one token of the attribution, or at all tokens at once; the estimate "
            "is then the sum over tokens.",
        )  # fmt: skip
    top = second.select_slider("Features taken out", [5, 10, 20, 40], value=10, key="n_ablated")
    with st.spinner("Taking features out ..."):
        found = lab.attribution_of(record, prompt, metric)
        done = lab.ablation_of(record, prompt, metric, where, top)
    if done.table.empty:
        st.info("No feature fires on these tokens.", icon=":material/bedtime:")
        return
    total = found.total()
    st.markdown(
        f"The metric is **{views.number(found.value)}**. To first order all features together "
        f"contribute **{views.number(total['features'])}**, and what the SAE leaves unexplained "
        f"**{views.number(total['error'])}**."
    )
    left, right = st.columns([3, 2], gap="large")
    with left:
        components.chart(effects_figure(done), key="effects", name="Effect of each feature")
    with right:
        components.chart(agreement_figure(done), key="agreement", name="Estimate and measurement")
        st.markdown(lab_views.agreement_words(done.agreement()))
    _table(record, done.table, ["feature", "label", "position", "token", "activation",
                                "attribution", "ablation", "control"])  # fmt: skip
    st.caption(
        "Effect = metric with the feature minus metric without it. Estimate: gradient times "
        "activation, the SAE's error kept (x = SAE(x) + error). Control: a random direction of the "
        "same length at the same tokens. Position 0 and special tokens are left out. Measured in "
        f"{lab.number_format(record)}."
    )


def _position(prompt: Prompt) -> Prompt:
    """The prompt up to the token after which the prediction is read."""
    last = len(prompt) - 1
    place = st.selectbox(
        "Predict what follows token",
        range(last, -1, -1),
        format_func=lambda i: f"{i} {views.spaced(prompt.texts[i])}" + (" (last)" * (i == last)),
        key="read_at",
        width=300,
    )
    return prompt.up_to(min(place, last))


def _metric(
    record: data.SaeRecord, likely: list[tuple[int, str, float]], key: str, start: int = 0
) -> Metric:
    """The metric a person chooses: a token's logit against another one's or the mean."""
    from app import lab

    left, right = st.columns(2)
    with left:
        target = token_box("Logit of", f"{key}_target", likely)
    with right:
        contrast = token_box("minus logit of", f"{key}_contrast", likely, extra=MEAN, start=start)
    known = {text: token for token, text, _ in likely}
    if not target or not contrast:
        raise UserError("choose a token, or type one, on both sides of the metric.")
    against = None if contrast == MEAN else lab.token_number(record, contrast, known)
    return Metric(target=lab.token_number(record, target, known), contrast=against)


@components.panel
def patching(record: data.SaeRecord, prompt: Prompt) -> None:
    """Which activations carry what tells two prompts apart."""
    from analyses.lab_figures import patching_figure
    from app import lab

    second = _second(record, prompt)
    if second is None:
        return
    clean, corrupted = prompt, second
    likely = [*lab.next_tokens(record, clean)[:5], *lab.next_tokens(record, corrupted)[:5]]
    choices = list({token: (token, text, share) for token, text, share in likely}.values())
    start = next((i for i, (_, text, _) in enumerate(choices) if i and text == likely[5][1]), -1)
    metric = _metric(record, choices, "patch", start + 1)
    kind, into, layers = _what(lab.n_layers(record))
    with st.spinner(f"Patching {len(layers)} layers ..."):
        pair = lab.pair_of(record, clean, corrupted, metric)
        grid = lab.grid_of(record, pair, kind, into, layers)
    _values(pair)
    effect, control = st.columns(2, gap="medium")
    with effect:
        st.markdown("**Patched from the other prompt**")
        cell = components.clickable(
            patching_figure(grid), key="patch_map", name="Effect by layer and position"
        )
    with control:
        st.markdown("**Control: patched from an unrelated prompt**")
        components.chart(
            patching_figure(grid, control=True), key="patch_control", name="Effect of the control"
        )
    st.caption(_explained(grid.positions[0]))
    _drill(grid, cell)
    _features(record, pair, into)


def _second(record: data.SaeRecord, prompt: Prompt) -> Prompt | None:
    """The other prompt, typed as a text; the first one is offered to be changed."""
    from app import lab

    first = "".join(prompt.texts[1:])
    if prompt.ids[0] != lab.separator(record):
        st.info(
            "Patching compares two texts: switch the input to Text, where a chat can be pasted as "
            "its template writes it."
        )
        return None
    with st.form("second", border=False):
        text = st.text_area(
            "The second text: the first one with a word changed for another of as many tokens",
            first, height=90, key=f"second_text_{abs(hash(first))}",
        )  # fmt: skip
        st.form_submit_button("Patch between the two", type="primary")
    if text == first:
        st.info(
            "Change a word of the second text, such as a name, and keep the number of tokens.",
            icon=":material/edit:",
        )
        return None
    return lab.prompt_of(record, text)


def _what(n_layers: int) -> tuple[PatchedKind, Into, tuple[int, ...]]:
    first, second, third = st.columns([4, 4, 4], vertical_alignment="bottom")
    with first:
        kind = components.choice("Patch", KINDS, key="patch_kind")
    with second:
        into = components.choice("Direction", INTOS, key="patch_into")
    with third:
        every = components.choice("Layers", {name: name for name in EVERY}, key="patch_every")
    # Counted down from the last layer, which is always there.
    return kind, into, tuple(range(n_layers - 1, -1, -EVERY[every]))[::-1]


def _values(pair: Pair) -> None:
    if pair.gap is None:
        st.warning(
            f"Both prompts give the metric {views.number(pair.clean_value)}, so there is nothing "
            "to divide by: the effects are plain differences in logits. Choose another pair of "
            "tokens to see shares.",
            icon=":material/balance:",
        )
        return
    st.markdown(
        f"The metric is **{views.number(pair.clean_value)}** on the first (clean) prompt and "
        f"**{views.number(pair.corrupted_value)}** on the second (corrupted) one."
    )


def _explained(first: int) -> str:
    before = (
        f" Both texts are the same up to token {first - 1}, where patching changes nothing; those "
        "columns are left out."
    )
    return (
        "One activation at a time is taken from the other prompt. Effect = (patched - corrupted) / "
        "(clean - corrupted). What the control does in a place, any disturbance does there. Click "
        "a cell for its numbers." + (before if first > 1 else "")
    )


def _drill(grid: PatchGrid, cell: tuple[int, int] | None) -> None:
    """The numbers of one cell: the clicked one, else the one of largest effect."""
    table = grid.table()
    columns = len(grid.positions)
    rows = len(grid.layers)
    if cell is not None and cell[0] < rows and cell[1] < columns:
        place = cell[0] * columns + cell[1]
    else:
        change = table["effect"] - (0 if grid.into == "corrupted" or grid.pair.gap is None else 1)
        place = int(change.abs().to_numpy().argmax())
    row = table.iloc[place]
    st.markdown(
        f"**{grid.kind}.{row['layer']}, token {row['position']}** "
        f"({views.markdown(views.spaced(row['clean']))} / "
        f"{views.markdown(views.spaced(row['corrupted']))}): effect "
        f"**{views.number(float(row['effect']))}**, control {views.number(float(row['control']))}"
    )


def _features(record: data.SaeRecord, pair: Pair, into: Into) -> None:
    """Single features of the SAE, patched."""
    from app import lab

    st.markdown(f"**Single features of this SAE ({record.run.config['site']}), patched**")
    with st.spinner("Patching features ..."):
        found = lab.patched_features(record, pair, into, 10)
    if found.table.empty:
        st.info("No feature's code differs between the two prompts at this site.")
        return
    _table(record, found.table, ["feature", "label", "position", "token", "n_tokens", "difference",
                                 "estimate", "effect", "control"])  # fmt: skip
    st.caption(
        "One feature's code at a time is taken from the other prompt at every token, all else "
        "kept. Effect: share of the way from the patched prompt's metric to the other's."
        if pair.gap is not None
        else "One feature's code at a time is taken from the other prompt at every token. Effects "
        "in logits."
    )


def _table(record: data.SaeRecord, table: pd.DataFrame, columns: Sequence[str]) -> None:
    from app import lab

    labels = lab.labels_of(record, table["feature"].tolist())
    shown = lab_views.with_links(table, record.name, labels)
    st.dataframe(
        shown,
        hide_index=True,
        column_order=[name for name in columns if name in shown],
        column_config={
            **COLUMNS,
            **{
                name: st.column_config.NumberColumn(name.replace("_", " ").capitalize(),
                                                    format="%.4g")
                for name in ("activation", "attribution", "ablation", "control", "difference",
                             "estimate", "effect", "position", "n_tokens")
            },
        },
    )  # fmt: skip

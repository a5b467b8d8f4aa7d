"""The prompt lab's views of one prompt that look at codes and layers: each a panel of the page."""

import streamlit as st

from app import components, data, lab_views, views
from app.style import GOLD_RGB
from probe.tokens import Prompt
from saes.prompts import PromptCodes, Ranking

RANKINGS: dict[Ranking, str] = {"max": "Largest", "mean": "Mean", "frequency": "Frequency"}
EXPLAINED = "Over the chosen tokens: largest and mean activation, share on which it fires."
TOP_BY_TOKEN = 6
MOST_SAES = 8
ALL_LAYERS = (
    "Only one SAE of this model is there, hence one row. Train one for each of several layers, all "
    "in one pass, by:"
)


@components.panel
def features(record: data.SaeRecord, prompt: Prompt) -> None:
    """The features that fire on the whole text or on one of its tokens."""
    from app import live

    with st.spinner("Running the model ..."):
        codes = live.prompt_codes(record, prompt)
    options = st.columns([3, 3, 2], vertical_alignment="bottom")
    with options[0]:
        by = components.choice("Rank features by", RANKINGS, key="ranking", explained=EXPLAINED)
    skip = options[1].toggle(
        "Leave out position 0 and special tokens", value=True, key="skip_special",
        help="Their activations have outlier norms, and the SAE was not trained on them.",
    )  # fmt: skip
    top = options[2].select_slider("Features shown", [5, 10, 20, 40], value=10, key="n_ranked")
    token = st.pills(
        "Pick a token, or none for the whole text",
        range(len(codes.texts)),
        format_func=lambda place: views.pill(codes.texts[place]),
        key="picked_token",
    )
    ranked = live.ranked(codes, token=token, skip_special=skip, by=by, top=top)
    if not ranked:
        st.info("No feature fires on these tokens.", icon=":material/bedtime:")
    else:
        of_what = (
            "the whole text"
            if token is None
            else f"token {token}, {views.spaced(codes.texts[token])}"
        )
        count = f"{len(ranked)} features with the most activation on {views.markdown(of_what)}"
        st.markdown(f"**{count}**")
    for place in ranked:
        _row(record, codes, place.feature, getattr(place, by), by)
    with st.expander("The strongest features of every token"):
        st.html(lab_views.by_token_html(codes, TOP_BY_TOKEN))


def _row(
    record: data.SaeRecord, codes: PromptCodes, feature: int, score: float, by: Ranking
) -> None:
    """A feature: a link to it, its score, what it usually fires on, the text in its colours."""
    from app import lab, live

    strip = live.prompt_strip(codes, feature)
    with st.container(border=True, gap="xsmall"):
        head, value, label = st.columns([2, 2, 8], vertical_alignment="center")
        with head:
            if record.index:
                components.feature_link(record, feature)
            else:
                st.markdown(f"Feature {feature}")
        shown = views.percent(score) if by == "frequency" else views.number(score)
        value.html(f'<span class="lg-muted">{RANKINGS[by].lower()} {shown}</span>')
        scale = max(strip.activations, default=0.0)
        if record.index:
            scale = max(scale, data.feature_index(record).feature(feature)["max"] or 0.0)
            text = views.escaped(lab.labels_of(record, [feature])[0])
            label.html(
                '<span class="lg-muted">usually on &nbsp;</span>'
                f'<span class="lg-tokens lg-muted">{text}</span>'
            )
        st.html(views.strip_html(strip, scale=scale))


@components.panel
def layers(record: data.SaeRecord, prompt: Prompt) -> None:
    """The strongest feature of each token in every SAE of the same model."""
    from app import lab, live

    records = {other.name: other for other in lab.same_model(record)}
    names = list(records)
    if len(names) > 1:
        names = st.multiselect(
            "SAEs of this model, by layer", names, default=names[:MOST_SAES], key="layer_saes",
            max_selections=MOST_SAES, placeholder="choose one or more",
        )  # fmt: skip
    if not names:
        st.info("Choose an SAE to see its row.")
        return
    names = sorted(names, key=list(records).index)
    with st.spinner("Running the model ..."):
        codes = {name: live.prompt_codes(records[name], prompt) for name in names}
    titles = _titles([records[name] for name in names])
    st.caption(
        "Each row is an SAE, the lowest layer at the bottom; the number is the feature that is "
        "strongest on the token. Click a cell to see the feature."
    )
    figure = lab_views.layers_figure(list(zip(titles, codes.values(), strict=True)))
    cell = components.clickable(
        figure, key="layers_map", name="The strongest feature of each token by SAE"
    )
    row, place = cell or (len(names) - 1, _strongest(codes[names[-1]]))
    if place < len(prompt):
        _cell(records[names[row]], codes[names[row]], place)
    if len(records) == 1:
        components.empty(ALL_LAYERS, _sweep_command(record))


def _titles(records: list[data.SaeRecord]) -> list[str]:
    """Sites as names of rows; where two SAEs share one, with the hash of the folder."""
    sites = [record.run.config["site"] for record in records]
    return [
        site if sites.count(site) == 1 else f"{site} ({record.name[-8:]})"
        for site, record in zip(sites, records, strict=True)
    ]


def _strongest(codes: PromptCodes) -> int:
    strongest = (codes.values * codes.keep[:, None]).amax(1)
    return int(strongest.argmax())


def _cell(record: data.SaeRecord, codes: PromptCodes, place: int) -> None:
    from saes.prompts import strongest_by_token

    where = f"token {place}, {views.spaced(codes.texts[place])}"
    st.markdown(f"**{record.run.config['site']}, {views.markdown(where)}**")
    best = strongest_by_token(codes, 3)[place]
    if not best:
        st.info("No feature fires on this token.", icon=":material/bedtime:")
    for feature, value in best:
        _row(record, codes, feature, value, "max")


def _sweep_command(record: data.SaeRecord) -> str:
    spec = record.run.config["model"]["spec"]
    return f"lorgnette sweep {spec} --corpus builtin --sites 'resid_post.*'"


@components.panel
def lens(record: data.SaeRecord, prompt: Prompt) -> None:
    """What the model would predict after each layer."""
    from analyses.lab_figures import lens_figure
    from app import lab

    with st.spinner("Running the model ..."):
        likely = lab.next_tokens(record, prompt)
        own = "what the model predicts at each place"
        follow, _ = st.columns([2, 3])
        with follow:
            chosen = token_box("Follow", "lens_token", likely, extra=own)
        known = {text: token for token, text, _ in likely}
        target = None if chosen in (own, None) else lab.token_number(record, chosen, known)
        found = lab.lens_of(record, prompt, target)
    st.caption(
        "The residual stream after each layer, read by the model's own final norm and unembedding; "
        "the last row is the model's prediction. In the cells the likeliest token. Early layers "
        "need not speak the last one's language, so a late arrival may have been there in other "
        "directions. Click a cell for its list."
    )
    cell = components.clickable(
        lens_figure(found), key="lens_map", name="Probability of a token by layer and position"
    )
    layer, place = cell or (found.n_layers - 1, len(prompt) - 1)
    if layer < found.n_layers and place < len(prompt):
        shares = found.top_probability[layer, place].tolist()
        where = f"after layer {layer} and token {place}, {views.spaced(prompt.texts[place])}"
        st.markdown(f"**Likeliest {views.markdown(where)}**")
        with st.container(width=520):
            st.html(views.bars_html(found.top_texts(layer, place), shares, colour=GOLD_RGB))


def token_box(
    label: str, key: str, likely: list[tuple[int, str, float]], *, extra: str | None = None,
    start: int = 0,
) -> str | None:  # fmt: skip
    """A token out of the likely ones or any other that a person types."""
    shares = {text: share for _, text, share in likely}
    options = [*([extra] if extra else []), *shares]
    return st.selectbox(
        label,
        options,
        index=start,
        format_func=lambda text: (
            f"{views.spaced(text)}  ({views.percent(shares[text])})" if text in shares else text
        ),
        key=key,
        accept_new_options=True,
        help="One of the likeliest next tokens, or type any one token. A space in front of a word "
        "is part of it: type it as \u00b7 (a middle dot), as in \u00b7Mary.",
    )

"""Steer: make, load and save a recipe, see both texts side by side, and measure its dose."""

import copy
from pathlib import Path
from typing import Any

import streamlit as st

from app import components, dashboard, data, recipe_editor, recipe_shelf, views
from probe.errors import UserError

PROMPT = "When I opened the door, I saw"
RECIPE, FOLDER, ROUND = "steer_recipe", "steer_folder", "steer_round"
TOLD = (
    "Steering adds the change to the activation, `x + delta`: what the SAE cannot reconstruct "
    "stays as it is. Position 0 and special tokens are left alone."
)


def show() -> None:
    """Draw the page."""
    components.heading(
        "Steer",
        "Change features, directions, neurons or heads while the model writes, and compare with "
        "what it writes by itself. The recipe is a file that the shell and notebooks run as well.",
    )
    records = [
        record for record in data.sae_records() if record.run.complete and not record.of_images
    ]
    components.elsewhere(of_images=False)
    if not records:
        components.no_sae([], of_images=False)
        return
    _begin(records)
    left, right = st.columns([5, 4], gap="large")
    with right:
        _load_and_new(records)
    with left:
        prompt = st.text_area("Prompt", PROMPT, height=80, key="steer_prompt")
        settings = _settings()
    _recipe_and_result(prompt, settings)


# -------------------------------------------------------------------------------------- the recipe


def _begin(records: list[data.SaeRecord]) -> None:
    """Start from what the address names (`?sae=&feature=` or `?recipe=`), once."""
    asked = {name: st.query_params.get(name) for name in ("sae", "feature", "recipe")}
    if RECIPE in st.session_state and st.session_state.get("steer_asked") == asked:
        return
    st.session_state["steer_asked"] = asked
    if asked["recipe"] is not None:
        _put(*recipe_shelf.read(data.recipe_path(asked["recipe"])))
    elif asked["feature"] is not None and not _of_images(asked["sae"]):
        record = data.sae_record(asked["sae"]) if asked["sae"] else records[0]
        if not asked["feature"].isdecimal():
            raise UserError(f"feature {asked['feature']!r} is not a number; they count from 0.")
        _put(feature_document(record, int(asked["feature"])), None)
    elif RECIPE not in st.session_state:
        saved = data.saved_recipes(of_images=False)
        if saved:
            _put(*recipe_shelf.read(saved[0]))
        else:
            _put(feature_document(records[0], _any_feature(records[0])), None)


def _of_images(name: str | None) -> bool:
    return name is not None and data.sae_record(name).of_images


def _any_feature(record: data.SaeRecord) -> int:
    return 0 if record.index is None else data.feature_index(record).random_alive(0)


def feature_document(record: data.SaeRecord, feature: int) -> dict[str, Any]:
    """The recipe to begin with: add a feature with its largest activation."""
    from saes.recipe_making import feature_recipe
    from saes.recipes import Statistics, Strength, to_json

    known = None
    if record.index is not None:
        row = data.feature_index(record).feature(feature)
        if row["alive"]:
            known = Statistics(mean=row["mean"], max=row["max"], sd=row["sd"])
    strength = Strength(value=1.0, unit="raw" if known is None else "max")
    return to_json(feature_recipe(record.run, feature, strength=strength, statistics=known))


def _put(document: dict[str, Any], folder: Path | None) -> None:
    """Make a document the recipe of this session; widgets forget what they showed."""
    if "draw" in document:
        raise UserError(f"the recipe {document['name']!r} draws images; open it on the page Paint.")
    st.session_state[RECIPE], st.session_state[FOLDER] = document, folder
    st.session_state[ROUND] = st.session_state.get(ROUND, 0) + 1


def _load_and_new(records: list[data.SaeRecord]) -> None:
    """Other recipes: those saved, a file from elsewhere, a new one."""

    def new() -> None:
        with st.popover("New", icon=":material/add:"):
            names = {record.name: record for record in records}
            name = st.selectbox("SAE", list(names), key="steer_new_sae")
            feature = st.number_input("of its features", 0, None, 0, key="steer_new_feature")
            if st.button("Begin", type="primary"):
                _put(feature_document(names[name], int(feature)), None)

    recipe_shelf.pick(of_images=False, key="steer", take=_put, beside=new)


# ---------------------------------------------------------------------------------------- the page


def _settings() -> dict[str, Any]:
    """How to generate."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        tokens = st.number_input("New tokens", 1, 500, 40, key="steer_tokens", width=120)
        temperature = st.number_input(
            "Temperature", 0.0, 5.0, 0.0, 0.1, key="steer_temperature", width=120,
            help="0 takes the likeliest token each time.",
        )  # fmt: skip
        seed = st.number_input("Seed", 0, None, 0, key="steer_seed", width=110)
        chat = st.toggle("Chat", key="steer_chat", help="Put the prompt into the chat template.")
        cache = st.toggle(
            "KV cache", value=True, key="steer_cache",
            help="Keep keys and values of past tokens. Without, the text is the same, and slower.",
        )  # fmt: skip
    generate = {
        "max_new_tokens": int(tokens), "temperature": float(temperature), "seed": int(seed),
        "cache": cache,
    }  # fmt: skip
    return {"generate": generate, "chat": chat}


@components.panel
def _recipe_and_result(prompt: str, settings: dict[str, Any]) -> None:
    document = _edited(prompt, settings["chat"])
    run, save = st.columns([5, 4], vertical_alignment="bottom", gap="large")
    with run, st.container(horizontal=True, vertical_alignment="bottom"):
        times = st.slider(
            "Times the recipe's strength", -2.0, 4.0, 1.0, 0.25, key="steer_times", width=320
        )
        pressed = st.button("Steer", type="primary", icon=":material/tune:")
    with save:
        if recipe_shelf.keep(document, key="steer"):
            st.session_state[RECIPE] = document
    st.caption(TOLD)
    if pressed:
        st.session_state["steer_result"] = _steer(document, prompt, settings, times)
    if result := st.session_state.get("steer_result"):
        _side_by_side(result)
    _dose(document)


def _edited(prompt: str, chat: bool) -> dict[str, Any]:
    """The recipe with what the form says."""
    document = copy.deepcopy(st.session_state[RECIPE])
    turn = st.session_state[ROUND]
    with st.container(border=True):
        head = st.columns([3, 5, 2], vertical_alignment="bottom")
        document["name"] = head[0].text_input("Recipe", document["name"], key=f"name-{turn}")
        document["note"] = head[1].text_input("Note", document["note"], key=f"note-{turn}")
        document["special_tokens"] = head[2].toggle(
            "Special tokens too", document["special_tokens"], key=f"special-{turn}"
        )
        saes = {key: sae["name"] for key, sae in document["saes"].items()}
        tokens = _tokens(document, prompt, chat)
        edits = []
        for number, edit in enumerate(document["edits"]):
            with st.container(border=True):
                edits.append(
                    recipe_editor.edit_form(edit, saes, tokens, key=f"edit-{turn}-{number}")
                )
                if len(document["edits"]) > 1:
                    st.button(
                        "Remove", key=f"remove-{turn}-{number}", on_click=_remove, args=(number,),
                        icon=":material/delete:", type="tertiary",
                    )  # fmt: skip
        document["edits"] = edits
        st.button(
            "Add an edit", on_click=_add, args=(document,), icon=":material/add:", type="tertiary"
        )
    for key, name in saes.items():
        st.caption(f"SAE `{key}`: {name}")
    return document


def _tokens(document: dict[str, Any], prompt: str, chat: bool) -> list[str]:
    """The prompt's tokens as text, where a mask is asked for: only then is the model needed."""
    turn = st.session_state[ROUND]
    keys = [f"edit-{turn}-{number}-positions" for number in range(len(document["edits"]))]
    masked = any(st.session_state.get(key) == "mask" for key in keys) or any(
        isinstance(edit.get("positions"), dict) and "mask" in edit["positions"]
        for edit in document["edits"]
    )
    if not masked:
        return []
    from app import live_steering

    return live_steering.texts_of_prompt(document["model"]["spec"], prompt, chat=chat)


def _add(document: dict[str, Any]) -> None:
    document["edits"].append(copy.deepcopy(document["edits"][-1]))
    _put(document, st.session_state[FOLDER])


def _remove(number: int) -> None:
    document = copy.deepcopy(st.session_state[RECIPE])
    del document["edits"][number]
    _put(document, st.session_state[FOLDER])


def _steer(
    document: dict[str, Any], prompt: str, settings: dict[str, Any], times: float
) -> dict[str, Any]:
    """Run both, with a bar that follows the tokens."""
    with st.spinner("Loading the model ..."):
        from app import live_steering
        from probe.generation import GenerateConfig

        ready, lock = live_steering.steering(document, st.session_state[FOLDER])
    config = GenerateConfig(**settings["generate"])
    bar, written = st.progress(0.0, "Writing ..."), 0

    def heard(_: int) -> None:
        nonlocal written
        written += 1
        bar.progress(min(written / (2 * config.max_new_tokens), 1.0), "Writing ...")

    with lock:
        compared = ready.compare(prompt, config, chat=settings["chat"], times=times, on_token=heard)
    bar.empty()
    return {
        "prompt": prompt,
        "default": compared.default.text,
        "steered": compared.steered.text,
        "kl": compared.kl,
        "next_token": compared.next_token,
        "name": f"{document['name']}, {times:g} times",
    }


def _side_by_side(result: dict[str, Any]) -> None:
    with st.container(key="steer_texts"):
        for column, side in zip(st.columns(2, gap="large"), ("default", "steered"), strict=True):
            with column:
                st.subheader("Default" if side == "default" else "Steered", anchor=False)
                st.caption("The model as it is" if side == "default" else result["name"])
                st.html(
                    '<div class="lg-tokens lg-said"><span class="lg-muted">'
                    f"{views.escaped(result['prompt'])}</span>{views.escaped(result[side])}</div>"
                )
                table = result["next_token"]
                st.caption("Next token after the prompt")
                st.html(views.bars_html(
                    table["text"].tolist(), [float(p) for p in table[side]], colour=views.BLUE_RGB
                ))  # fmt: skip
    st.caption(f"KL(default || steered) of the next token: {views.number(result['kl'])} nats")


# ---------------------------------------------------------------------------------------- the dose


def _dose(document: dict[str, Any]) -> None:
    """Effect and cost at several strengths beside controls: measured when asked for."""
    with st.expander("Dose and response, beside controls of the same size"):
        st.markdown(
            "Runs the recipe at several strengths on openings of documents and on neutral text, "
            "beside random directions, random features and, where there is one, the same feature "
            "of the random-weight twin. The quick one here takes a minute or two; the full one:"
        )
        path = data.recipe_folder() / data.file_name(document["name"])
        st.code(f"lorgnette analyse dose-response --recipes {path}", language="bash")
        effect = st.text_input(
            "Wanted tokens, separated by |", " | ".join(document["effect"]),
            key=f"effect-{st.session_state[ROUND]}",
            help="Single tokens; a space in front belongs to the token.",
        )  # fmt: skip
        wanted = [" " + part.strip() for part in effect.split("|") if part.strip()]
        if st.button("Measure", icon=":material/show_chart:"):
            st.session_state["steer_dose"] = _measure_dose(document | {"effect": wanted})
        if (dosed := st.session_state.get("steer_dose")) is not None:
            _dose_figures(dosed)


def _measure_dose(document: dict[str, Any]) -> Any:
    with st.status("Loading the model ...") as status:
        from app import live_steering

        return live_steering.dose(
            document, st.session_state[FOLDER], lambda what: status.update(label=f"{what} ...")
        )


def _dose_figures(dosed: Any) -> None:
    from analyses.dose_findings import figure, stands_out

    for measure in ("tokens", "text"):
        if measure in dosed.measures():
            found = stands_out(dosed, measure)
            st.markdown(f"{found.claim} **{found.word}**: {found.measured}")
    with st.container(width=900):
        for measure in dosed.measures():
            components.chart(
                figure([dosed], measure), key=f"dose-{measure}", name=measure, own_colours=True
            )


if __name__ == "__main__":
    dashboard.enter(show)

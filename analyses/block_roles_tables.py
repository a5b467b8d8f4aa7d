"""The block-roles study's tables, as a person reads them."""

from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from analyses.block_roles_locality import KINDS
from analyses.block_roles_measured import ALL_BLOCKS, OPENED, OWN, Frame, Measured
from analyses.block_roles_numbers import (
    accuracy,
    changed_unasked,
    from_draws,
    locality_by_feature,
    mean_of,
    moved_share,
    mover,
    others_changed,
    patches,
    predictor,
    pushed_by_value,
    select,
    share_of,
    transport_means,
    value_mean,
    value_rows,
)
from analyses.block_roles_probes import PAIR, PROBED
from analyses.block_roles_sweep import in_steps
from probe.toyturbo.world import FACTORS
from saes.probing import f1_score

Rows = list[dict[str, Any]]


def tables(measured: Measured) -> dict[str, pd.DataFrame]:
    """Every table by name; those of nothing measured are left out."""
    makers: dict[str, Callable[[Measured], Rows]] = {"ablations": ablations}
    if measured.known:
        makers = {
            "roles": roles,
            "prediction": prediction,
            "patching": patching,
            "ablations": ablations,
            "values_by_block": values_by_block,
            "values": values,
            "pairs_of_colour_and_shape": pairs_of_values,
            "pushes_of_features": pushes,
        }
    makers |= {
        "locality": locality,
        "top_images": top_images,
        "k_and_width": widths,
        "four_steps": steps,
        "features_in_four_steps": pushes_in_steps,
        "transport": transport,
    }
    found = {name: pd.DataFrame(make(measured)) for name, make in makers.items()}
    return {name: table for name, table in found.items() if len(table)}


# ----------------------------------------------------------------------------------------- roles


def roles(measured: Measured) -> Rows:
    """The headline: which block predicts each factor best, and which moves it."""
    rows = []
    for factor in FACTORS:
        best, moves = predictor(measured, factor), mover(measured, factor)
        moved = moved_share(measured, moves, factor)
        rows.append(
            {
                "factor": factor,
                "drawn as said": measured.fidelity.get(factor, float("nan")),
                "predicted best by": best,
                "accuracy": str(accuracy(measured, best, factor, "codes")),
                "moved most by": moves if moved.value > 0 else "none",
                "moved": str(moved),
                "moved by all together": str(moved_share(measured, ALL_BLOCKS, factor)),
                "opened in training for it": ", ".join(OPENED.get(factor, ())) or "none",
            }
        )
    return rows


def prediction(measured: Measured) -> Rows:
    """What each block's features predict, beside the update itself, shuffled labels, the twin."""
    rows = []
    for factor in PROBED:
        for block in measured.blocks:
            row = {
                "factor": factor,
                "block": block,
                "probe on codes": str(accuracy(measured, block, factor, "codes")),
                "on the update": str(accuracy(measured, block, factor, "update")),
                "on shuffled labels": str(accuracy(measured, block, factor, "shuffled")),
            }
            if block in measured.twins:
                twin = accuracy(measured, block, factor, "codes", "twin")
                row["on the twin's codes"] = str(twin)
            row |= {
                "best features F1": str(value_mean(measured, block, factor, "f1")),
                "AUROC": str(value_mean(measured, block, factor, "auroc")),
                "shuffled F1": str(value_mean(measured, block, factor, "f1", "shuffled")),
            }
            if block in measured.twins:
                f1 = value_mean(measured, block, factor, "f1", weights="twin")
                row["twin's F1"] = str(f1)
            rows.append(row)
    return rows


def patching(measured: Measured) -> Rows:
    """What swapping each block's update does to each factor."""
    rows = []
    for factor in FACTORS:
        for block in (*measured.blocks, ALL_BLOCKS):
            of = patches(measured, block, factor)
            row = {
                "factor": factor,
                "update of": block,
                "pairs": len(of),
                "became the source's": str(moved_share(measured, block, factor)),
                "something else changed": str(others_changed(of, factor)),
                "changed by pairs of other factors": str(
                    changed_unasked(measured, block, factor, "patch")
                ),
                "changed by other noise": str(changed_unasked(measured, block, factor, "noise")),
            }
            if measured.twins:
                row["twin: became the source's"] = str(moved_share(measured, block, factor, "twin"))
            rows.append(row)
    return rows


def ablations(measured: Measured) -> Rows:
    """What an image loses without a block's update."""
    rows = []
    for weights in ("trained", "twin"):
        for block in measured.blocks:
            for what in ("zero", "mean"):
                wanted = {"weights": weights, "block": block, "what": what}
                of = select(measured.table("causes"), wanted)
                if not len(of):
                    continue
                row: dict[str, Any] = {"weights": weights, "block": block, "update": what}
                if measured.known:
                    row |= {factor: str(share_of(of[factor])) for factor in FACTORS}
                rows.append(row | {"change of a pixel": str(mean_of(of["pixels"]))})
    return rows


# ---------------------------------------------------------------------------------------- values


def values_by_block(measured: Measured) -> Rows:
    """How many values of single factors have a feature of their own, and what became of others."""
    rows = []
    for block in measured.blocks:
        states = value_states(measured, block)
        single = states[states["factor"] != PAIR]
        named = single["state"].str
        row: dict[str, Any] = {
            "block": block,
            "values": len(single),
            f"F1 {OWN:g} or more": owned_count(measured, block, OWN),
            "F1 0.9 or more": owned_count(measured, block, 0.9),
            "split": int(named.startswith("split").sum()),
            "hidden": int(named.startswith("hidden").sum()),
            "absent": int(named.startswith("absent").sum()),
            "merged": int(named.endswith("merged").sum()),
            "pairs of colour and shape": int(
                (states[states["factor"] == PAIR]["best"] >= OWN).sum()
            ),
            "on shuffled labels": owned_count(measured, block, OWN, control="shuffled"),
        }
        if block in measured.twins:
            row["of the twin"] = owned_count(measured, block, OWN, weights="twin")
        rows.append(row)
    return rows


def values(measured: Measured) -> Rows:
    """The best feature of every value of every factor, by block."""
    return _value_rows(measured, tuple(FACTORS))


def pairs_of_values(measured: Measured) -> Rows:
    """The same of every pair of colour and shape."""
    return _value_rows(measured, (PAIR,))


def _value_rows(measured: Measured, factors: Iterable[str]) -> Rows:
    states: Frame = pd.concat(
        [value_states(measured, block).assign(block=block) for block in measured.blocks]
    )
    rows = []
    for (factor, value), of in states.groupby(["factor", "value"], sort=False):
        if factor not in factors:
            continue
        row: dict[str, Any] = {"factor": factor, "value": value}
        for one in of.to_dict("records"):
            row[one["block"]] = f"{one['f1']} {one['state']}"
        rows.append(row)
    return rows


def value_states(measured: Measured, block: str, weights: str = "trained") -> Frame:
    """Of each value: `factor, value, feature, f1` (words), `best` (a number), `state`.

    The state is `own` (a feature of F1 `OWN` or more), `split over n` (n features joined by "or"
    reach it), `hidden` (the linear probe's answers reach it) or `absent`, with `, merged` where it
    is not its own and another value of the factor has the same best feature.
    """
    wanted = {"weights": weights, "block": block, "control": ""}
    rows, found = select(measured.table("values"), wanted), []
    for row in rows.to_dict("records"):
        same = rows[(rows["factor"] == row["factor"]) & (rows["feature"] == row["feature"])]
        state = state_of(row, probe_f1(measured, block, row["factor"], row["value"], weights))
        f1 = from_draws(row["f1"], measured.settings.images // 2)
        # A feature that never answers rightly is nobody's.
        merged = ", merged" if state != "own" and len(same) > 1 and f1.value > 0 else ""
        found.append(
            {
                "factor": row["factor"], "value": row["value"], "feature": row["feature"],
                "f1": str(f1), "best": f1.value, "state": state + merged,
            }
        )  # fmt: skip
    return pd.DataFrame(found)


def state_of(row: dict[str, Any], probed: float) -> str:
    """Whether a value has a feature of its own, is split, hidden or absent."""
    if row["f1"][0] >= OWN:
        return "own"
    if row["union"][0] >= OWN:
        return f"split over {len(row['joined'])}"
    return "hidden" if probed >= OWN else "absent"


def probe_f1(
    measured: Measured, block: str, factor: str, value: str, weights: str = "trained"
) -> float:
    """F1 of the linear probe's answers for a value."""
    wanted = {"weights": weights, "block": block, "factor": factor, "source": "codes"}
    rows = select(measured.table("answers"), wanted)
    names = _names(factor)
    number = names.index(value)
    truth, said = (rows[name].to_numpy() == number for name in ("label", "answer"))
    return f1_score(truth, said)


def _names(factor: str) -> tuple[str, ...]:
    if factor == "position":
        return ("no thing", "a thing")
    if factor == PAIR:
        return tuple(f"{c} {s}" for c in FACTORS["colour"] for s in FACTORS["shape"])
    return FACTORS[factor]


def owned_count(
    measured: Measured, block: str, least: float, *, weights: str = "trained", control: str = ""
) -> int:
    """How many values of single factors have a feature of that F1 in a block."""
    rows = value_rows(measured, block, control, weights)
    return int(sum(draws[0] >= least for draws in rows["f1"])) if len(rows) else 0


# -------------------------------------------------------------------------------------- features


def pushes(measured: Measured) -> Rows:
    """What adding a value's best feature does, beside changes of the same size."""
    rows = []
    table = measured.table("pushes")
    for block in measured.blocks:
        for kind in KINDS:
            of = select(table, {"block": block, "kind": kind, "counts": True})
            if not len(of):
                continue
            by_dose = {
                f"dose {dose:g}": str(mean_of(_by_value(of[of["dose"] == dose])))
                for dose in sorted(of["dose"].unique())
            }
            all_of_it = mean_of(pushed_by_value(measured, kind, block=block))
            others = mean_of(pushed_by_value(measured, kind, block=block, column="others"))
            rows.append(
                {"block": block, "added": kind, "became the value": str(all_of_it)}
                | by_dose
                | {"something else changed": str(others)}
            )
    return rows


def _by_value(rows: Frame) -> Frame:
    return rows.groupby(["factor", "value"])["became"].mean()


def locality(measured: Measured) -> Rows:
    """Where features change the image, beside their controls."""
    rows = []
    for weights in ("trained", "twin"):
        for block in measured.blocks:
            for kind in KINDS:
                share = locality_by_feature(measured, block, kind, weights=weights)
                if not len(share):
                    continue
                of = select(
                    measured.table("locality"), {"weights": weights, "block": block, "kind": kind}
                )
                row = {
                    "weights": weights,
                    "block": block,
                    "change": kind,
                    "features": len(share),
                    "share inside": str(mean_of(share)),
                    "inside": float(of["inside"].mean()),
                    "outside": float(of["outside"].mean()),
                }
                if kind == KINDS[0]:
                    there = locality_by_feature(
                        measured, block, kind, elsewhere=True, weights=weights
                    )
                    row["share inside another's map"] = str(mean_of(there))
                rows.append(row)
    return rows


def top_images(measured: Measured) -> Rows:
    """What the top images of features have in common, beside images by lot."""
    rows = []
    table = measured.table("scores")
    if not len(table):
        return rows
    for (score, weights, block), of in table.groupby(["score", "weights", "block"], sort=False):
        rows.append(
            {
                "score": score, "weights": weights, "block": block, "features": len(of),
                "top images": str(mean_of(of["value"])),
                "random images": str(mean_of(of["random"])),
                "difference": str(mean_of(of["value"] - of["random"])),
            }
        )  # fmt: skip
    return rows


def widths(measured: Measured) -> Rows:
    """What each SAE explains, and how many values have a feature of their own in it."""
    rows = []
    for row in measured.table("widths").to_dict("records"):
        n = measured.settings.images
        shown = {
            "block": row["block"],
            "k": row["k"],
            "features": row["d_sae"],
            "active": row["active"],
            "variance explained": str(from_draws(row["explained"], n)),
            "mean over channels": row["explained_by_channel"],
        }
        if measured.known:
            shown["values with their own feature"] = str(from_draws(row["owned"], n // 2))
        rows.append(shown)
    return sorted(
        rows, key=lambda row: (measured.blocks.index(row["block"]), row["features"], row["k"])
    )


def steps(measured: Measured) -> Rows:
    """What the SAEs explain of each step."""
    return [
        {
            "block": row["block"], "drawn in steps": row["steps"], "step": row["step"],
            "variance explained": str(from_draws(row["explained"], in_steps(measured.settings))),
        }
        for row in measured.table("steps").to_dict("records")
    ]  # fmt: skip


def pushes_in_steps(measured: Measured) -> Rows:
    """What adding features does in one step and in four."""
    table = measured.table("pushes_in_steps")
    if not len(table):
        return []
    rows = []
    counted = table[table["counts"].astype(bool)]
    for (when, kind), of in counted.groupby(["when", "kind"], sort=False):
        by_value = of.groupby(["block", "factor", "value"])[["became", "others"]].mean()
        rows.append(
            {
                "changed at": when, "added": kind, "features": len(by_value),
                "became the value": str(mean_of(by_value["became"])),
                "something else changed": str(mean_of(by_value["others"])),
                "change of a pixel there": str(mean_of(of["inside"])),
            }
        )  # fmt: skip
    return rows


def transport(measured: Measured) -> Rows:
    """Every way of transport at every setting."""
    table = measured.table("transports")
    if not len(table):
        return []
    rows = []
    counted = table[table["counts"].astype(bool)]
    for one in transport_means(table).to_dict("records"):
        of = select(counted, {name: one[name] for name in ("method", "k", "m")})
        rows.append(
            {
                "method": one["method"], "k": one["k"], "m": one["m"], "pairs": len(of),
                "became the source's": str(share_of(of["moved"])),
                "something else changed": str(share_of(of["others"])),
                "change of a pixel outside": str(mean_of(of["outside"])),
            }
        )  # fmt: skip
    return rows

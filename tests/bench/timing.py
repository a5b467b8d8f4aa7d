"""Timing several ways of doing the same thing side by side, in turns, so that the machine's moods
fall on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import pandas as pd


def side_by_side(
    ways: Mapping[str, Callable[[], object]],
    work: float | Sequence[float],
    unit: str,
    rounds: int = 5,
    *,
    settle: bool = False,
) -> pd.DataFrame:
    """Rate of each way, in turns A B C A B C ..., after one round of warm-up.

    Args:
        ways: what to time, by name; the first one is the reference of the ratios.
        work: units of work that one call does; one number for each way where they differ.
        unit: their name.
        rounds: counted rounds.
        settle: call each way once more before it is timed, in the cache and memory that the way
            before it left.

    Returns:
        A row a way: median rate, its range over the rounds, and the median of the round-by-round
        ratios to the first way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in range(-1, rounds):
        for name, way in ways.items():
            if settle:
                way()
            started = time.perf_counter()
            way()
            if counted >= 0:
                seconds[name].append(time.perf_counter() - started)
    works = [work] * len(ways) if isinstance(work, (int, float)) else list(work)
    reference = next(iter(seconds.values()))
    return pd.DataFrame(
        [
            {
                "way": name,
                f"{unit}/s": own_work / statistics.median(times),
                "lowest": own_work / max(times),
                "highest": own_work / min(times),
                "times as fast as the first": statistics.median(
                    base / works[0] * own_work / own
                    for base, own in zip(reference, times, strict=True)
                ),
            }
            for (name, times), own_work in zip(seconds.items(), works, strict=True)
        ]
    )

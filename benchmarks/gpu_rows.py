"""How `gpu.py` measures: rows that fail alone, in a budget of time."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch
from timing import Case, CaseFailed, peak_bytes, ratio, rounds_of, spread


class Skipped(Exception):
    """A case that is not for this machine, and why."""


@dataclass
class Comparison:
    """Cases that are measured in the same rounds.

    Args:
        peer: the case that the others are compared with.
        cases: what builds each of them. They are built one after the other and live until the last round.
        tokens: how many tokens a run generates, where that is what counts.
        passes: how often a round goes through all cases; short ones need more.
        notes: what else is to be said of a case; called once it ran.
    """

    section: str
    what: str
    peer: str
    cases: dict[str, Callable[[], Case]]
    tokens: int | None = None
    passes: int = 1
    notes: dict[str, Callable[[], str]] = field(default_factory=dict)


MEASURED, FAILED, LEFT_OUT, SKIPPED = "measured", "failed", "left out", "skipped"


@dataclass
class Row:
    """One case with its raw figures: seconds of a run in each round, and the peak of its memory in bytes."""

    section: str
    what: str
    case: str
    peer: str
    tokens: int | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    status: str = MEASURED
    reason: str = ""
    note: str = ""

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason, self.seconds = status, reason, []


class Budget:
    """Seconds until the end of something, of which what follows gets shares."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock, self.began = seconds, clock, clock()

    def left(self) -> float:
        return self.seconds - self.spent()

    def spent(self) -> float:
        return self.clock() - self.began

    def share(self, weight: float, following: float = 0.0) -> "Budget":
        """What is left, divided between something and what follows by their weights: what one leaves over the next gets."""
        return Budget(max(self.left(), 0.0) * weight / (weight + following), self.clock)


class Progress:
    """Anything that is told of rows and rounds that are done; the base tells nobody."""

    def about(self, text: str) -> None:
        pass

    def done(self, steps: int = 1) -> None:
        pass


def measure(
    comparison: Comparison,
    device: str,
    rounds: int,
    budget: Budget,
    following: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """All rows of a comparison, those without figures too; as many rounds as fit, and `rounds` at most.

    Rows and a first round may take all of the budget, because half a comparison is of no use; more rounds have an equal
    share of it with the comparisons that follow.
    """
    progress, own = progress or Progress(), budget.share(1, following)
    progress.about(f"{comparison.section}: {comparison.what}")
    rows, cases = [], {}
    for name, build in comparison.cases.items():
        rows.append(row := Row(comparison.section, comparison.what, name, comparison.peer, comparison.tokens))
        # The round to come takes no longer than these first runs.
        if own.spent() >= budget.left():
            row.end(LEFT_OUT, "no time was left for this row")
        elif case := _prepared(row, build, comparison.notes.get(name), device):
            cases[name] = case
        progress.done()
        if row.status == FAILED:
            free(device)
    by_name = {row.case: row for row in rows}
    going = _rounds(cases, by_name, device, comparison.passes, own) if budget.left() > 0 else ()
    for seconds in islice(going, rounds):
        for name, value in seconds.items():
            by_name[name].seconds.append(value)
        progress.done(len(rows))
    for row in rows:
        if row.status == MEASURED and not row.seconds:
            row.end(LEFT_OUT, "no time was left for a round")
    return rows


def _prepared(row: Row, build: Callable, note: Callable | None, device: str) -> Case | None:
    """The case after its first runs, if they worked; the peak is known then."""
    try:
        case = build()
        peak = peak_bytes(case, device)
        row.peak_bytes = peak if case.allocates else None
        row.note = note() if note is not None else ""
        return case
    except Skipped as skipped:
        return row.end(SKIPPED, str(skipped))
    except Exception as error:
        return row.end(FAILED, described(error))


def _rounds(
    cases: dict[str, Case], rows: dict[str, Row], device: str, passes: int, budget: Budget
) -> Iterator[dict[str, float]]:
    """A round of all cases that still work, and more while there is time for another as long as the last.

    A case that fails takes its figures with it, and the others go on.
    """
    while cases:
        try:
            start = budget.spent()
            for seconds in rounds_of(cases, device, passes):
                yield seconds
                if budget.left() < budget.spent() - start:
                    return
                start = budget.spent()
        except CaseFailed as failed:
            rows[failed.name].end(FAILED, described(failed.__cause__))
            cases = {name: case for name, case in cases.items() if name != failed.name}
        free(device)


def described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def free(device: str) -> None:
    """Give back what nothing refers to any more, so that the next row has it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def with_ratios(rows: list[Row]) -> list[dict]:
    """Rows as dictionaries, with what follows from their raw figures and those of their peers.

    Ratios are taken round by round, median and quartiles; they are None without a peer or without a figure.
    """
    peers = {(row.section, row.what, row.case): row for row in rows}
    return [asdict(row) | _derived(row, peers[row.section, row.what, row.peer]) for row in rows]


def _derived(row: Row, peer: Row) -> dict:
    found = {"ms": None, "time_ratio": None, "peak_ratio": None, "tokens_per_second": None}
    if row.seconds:
        median = spread(row.seconds).median
        found["ms"] = 1e3 * median
        found["tokens_per_second"] = row.tokens / median if row.tokens else None
        if peer.seconds:
            both = {"row": row.seconds, "peer": peer.seconds}
            found["time_ratio"] = vars(ratio(both, "row", "peer"))
    if row.peak_bytes is not None and peer.peak_bytes:
        found["peak_ratio"] = row.peak_bytes / peer.peak_bytes
    return found

"""Studies: notebooks run for many models and concepts, resumed, each run published whole or not at all.

`locogen.studies.planning` says what a study file may hold. A finished run is skipped while its `key` holds: the hash of
notebook, parameters, concept, weights (model, own scorer) and code. A failed one leaves `error.json`, and is left as it
is until it is asked for again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from locogen.console import show_any_text
from locogen.errors import LocogenError, unknown
from locogen.files import alone, clear, load_json, write_json, writing
from locogen.studies.estimates import Costs, duration
from locogen.studies.planning import Planned, read_study

if TYPE_CHECKING:
    from locogen.studies.engines import Engine
    from locogen.studies.progress import Board
    from locogen.studies.worker import Outcome

__all__ = ["StudyFailed", "read_study", "run_study"]


class StudyFailed(LocogenError):
    """Some runs of a study failed; the others are there."""


def run_study(
    path: str | Path,
    *,
    only: str | Iterable[str] | None = None,
    force: bool = False,
    retry_failed: bool = False,
    keep_going: bool = False,
    dry_run: bool = False,
    engine: str = "processes",
    workers: int | None = None,
    scheduler: str | None = None,
) -> Path:
    """Run what a study still lacks, and return its results folder.

    `only`: slugs, as the plan prints them; `force`: finished ones too; `retry_failed`: those too that failed before;
    `keep_going`: after a failure too; `dry_run`: the plan, no run. `engine`: serial, processes or dask, with so many
    `workers` at once (None: as many as fit the machine), or those of Dask's `scheduler` ("tcp://…").
    Every parameter is checked before the first kernel starts. Raises `LocogenError` when the study is not in
    order, `StudyFailed` at the end when runs failed. Ctrl-C says what is left; the same call goes on there.
    """
    if workers is not None and workers < 1:
        raise LocogenError(f"workers is {workers}: give a whole number from 1 up")
    show_any_text()
    title, results, runs = read_study(path)
    wanted = _selected(runs, only)
    if dry_run:
        _todo(title, results, wanted, force, retry_failed)
        return results
    with writing(results):
        results.mkdir(parents=True, exist_ok=True)
    with alone(results):
        todo, costs = _todo(title, results, wanted, force, retry_failed)
        kept = {run.slug: _told(run) for run in wanted if run not in todo and run.state == "failed"}
        failed: dict[str, str] = {}
        if todo:
            base = Path(
                os.path.relpath(runs[0].base, results)
            ).as_posix()  # where the runs' paths begin
            write_json(
                results / "study.json",
                {"title": title, "base": base, "runs": [run.slug for run in runs]},
            )
            with _board(results, todo, costs, engine, workers, scheduler) as (board, opened):
                failed = _go(results, todo, board, opened, keep_going)
    if failed or kept:
        raise StudyFailed(_complaint(len(wanted), failed, kept))
    return results


def _todo(
    title: str, results: Path, wanted: list[Planned], force: bool, retry_failed: bool
) -> tuple[list[Planned], Costs]:
    """The runs to do, shown among the others, and what runs have cost so far."""
    states = {run.slug: run.state for run in wanted}
    skipped = () if force else ("done",) if retry_failed else ("done", "failed")
    todo = [run for run in wanted if states[run.slug] not in skipped]
    costs = Costs(results)
    _show_plan(title, results, wanted, todo, states, costs)
    return todo, costs


def _selected(runs: tuple[Planned, ...], only: str | Iterable[str] | None) -> list[Planned]:
    if only is None:
        return list(runs)
    slugs = [only] if isinstance(only, str) else list(only)
    for slug in slugs:
        if slug not in {run.slug for run in runs}:
            raise unknown("run", slug, [run.slug for run in runs])
    return [run for run in runs if run.slug in slugs]


def _told(run: Planned) -> str:
    """Why a run failed before, in a line."""
    return (
        str(load_json(run.folder / "error.json").get("error", "")).strip().splitlines()
        or ["it did not say why"]
    )[0]


def _complaint(total: int, failed: dict[str, str], kept: dict[str, str]) -> str:
    told = "".join(f"\n  {slug}: {error}" for slug, error in {**kept, **failed}.items())
    before = f", {len(kept)} of them before" if kept else ""
    return f"{len(failed) + len(kept)} of {total} runs failed{before}; --retry failed tries them again:{told}"


def _show_plan(
    title: str,
    results: Path,
    wanted: list[Planned],
    todo: list[Planned],
    states: dict[str, str],
    costs: Costs,
) -> None:
    """The runs, the pictures they look at, what is there, and the time it takes, as far as these can be told."""
    print(f"{title}: {len(wanted)} runs, {len(todo)} to do, into {results}", flush=True)
    counts = {run.slug: costs.pictures(run) for run in todo}
    slugs = {run.slug for run in todo}
    width = max(len(run.slug) for run in wanted)
    for run in wanted:
        state = states[run.slug]
        again = " (again)" if run.slug in slugs and state in ("done", "failed") else ""
        cost = [f"{counts[run.slug]} pictures"] if counts.get(run.slug) else []
        if run.slug in slugs and (seconds := costs.seconds(run)):
            cost.append(f"about {duration(seconds)}")
        told = "  ".join(
            [f"{run.slug:{width}}", state + again, *([", ".join(cost)] if cost else [])]
        )
        print(f"  {told}", flush=True)
    if todo:
        print(_sum(results, todo, counts, costs), flush=True)


def _sum(results: Path, todo: list[Planned], counts: dict[str, int | None], costs: Costs) -> str:
    """What is to be made in all, what the store holds, and the time in one worker."""
    known = [count for count in counts.values() if count is not None]
    more = (
        f" and those of {len(todo) - len(known)} more that cannot be told yet"
        if len(known) < len(todo)
        else ""
    )
    held = sum(1 for _ in (results / "store").glob("*.png")) if (results / "store").is_dir() else 0
    seconds = costs.left(todo, 1)
    took = (
        "no run like these has been timed yet"
        if seconds is None
        else f"about {duration(seconds)} in one worker"
    )
    return f"to make: {sum(known)} pictures{more}; the store holds {held}; {took}"


@contextlib.contextmanager
def _board(
    results: Path,
    todo: list[Planned],
    costs: Costs,
    engine: str,
    workers: int | None,
    scheduler: str | None,
) -> Iterator[tuple[Board, Engine]]:
    """The engine at work, and the board that tells of it."""
    from locogen.studies.engines import opened
    from locogen.studies.kernel import silence
    from locogen.studies.progress import Board

    try:
        with silence(), opened(engine, todo, workers, scheduler) as chosen:
            threads = f" (threads of each: {chosen.threads})" if chosen.threads else ""
            print(
                f"{engine}: {chosen.workers or 'no worker yet, so none'} at once{threads}",
                flush=True,
            )
            with Board(results, todo, chosen.workers, costs) as board:
                yield board, chosen
    finally:
        clear(results)  # of a Dask worker that was told to stop in the middle


def _go(
    results: Path, todo: list[Planned], board: Board, engine: Engine, keep_going: bool
) -> dict[str, str]:
    """Submit every run, and tell of each when it is over; slug → error of those that failed."""
    from locogen.studies.worker import run_one

    failed: dict[str, str] = {}
    waiting = {engine.executor.submit(run_one, run, engine.threads): run for run in todo}
    left = {run.slug: run for run in todo}
    try:
        while waiting:
            over, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in [future for future in waiting if future in over]:
                run = waiting.pop(future)
                if future.cancelled():
                    continue
                outcome = _outcome(future, run, engine)
                del left[run.slug]
                board.over(run, outcome)
                if outcome.error:
                    failed[run.slug] = outcome.error
            if failed and not keep_going:
                _hold(waiting, board)
            board.look()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            # Some may have ended since anybody looked.
            named = [slug for slug, run in left.items() if run.state not in ("done", "failed")]
            board.say(f"interrupted\nleft: {', '.join(named)}. The same command goes on from here.")
        _stop(results, waiting)
        raise
    if left and failed and not keep_going:
        board.say(
            f"stopped at the first failure; left: {', '.join(left)}. --keep-going runs them all the same."
        )
        return failed
    return failed | _lost(left)


def _lost(left: Mapping[str, Planned]) -> dict[str, str]:
    """Runs whose end nobody heard of, though nobody stopped them either: slug → error.

    A Dask scheduler that goes away cancels all its futures. What was published before counts.
    """
    message = (
        "not finished: Dask's scheduler or the way to it was lost. The same command runs it again"
    )
    return {slug: message for slug, run in left.items() if run.state != "done"}


def _outcome(future: Future[Outcome], run: Planned, engine: Engine) -> Outcome:
    """What became of a run; one whose workers all died has failed."""
    from locogen.studies.worker import give_up

    try:
        return future.result()
    except engine.lost:
        return give_up(run, "its worker died again and again, most often for want of memory")


def _hold(waiting: Mapping[Future[Outcome], Planned], board: Board) -> None:
    """Let none begin that is not at work. Dask's futures can be canceled at any time, so ask for the folders."""
    begun = board.at_work()
    for future, run in waiting.items():
        if run.slug not in begun:
            future.cancel()


def _stop(results: Path, waiting: Iterable[Future[Outcome]]) -> None:
    """End all runs: their kernels go with their folders."""
    waiting = list(waiting)
    for future in waiting:
        future.cancel()
    while waiting:
        clear(results)
        waiting = list(wait(waiting, timeout=0.2).not_done)

"""Studies: notebooks run for many models and concepts, resumed, each run published whole or not.

`locogen.studies.planning` says what a study file may hold. A finished run is skipped while its
`key` is the same: the hash of notebook, parameters, concept, weights (model, own scorer) and code.
A failed run leaves `error.json`, and is not tried again until somebody asks for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from locogen.console import show_any_text
from locogen.errors import LocogenError, unknown
from locogen.files import load_json, locked, remove_leftovers, write_json, writing
from locogen.studies.estimates import Costs, duration
from locogen.studies.planning import Planned, read_study
from locogen.studies.worker import Outcome, first_line, give_up, run_one

# A plan should appear at once: rich, papermill and Dask are imported when runs are started.
if TYPE_CHECKING:
    from locogen.studies.engines import Engine
    from locogen.studies.progress import Board

__all__ = ["StudyFailed", "read_study", "run_study"]


class StudyFailed(LocogenError):
    """Some runs of a study failed; the results of the others are there."""

    exit_code = 1  # of the command line


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
    """Run what a study still lacks.

    Every parameter is checked before the first kernel starts. After Ctrl-C, the same call continues
    where the study was interrupted.

    Args:
        path: The study's TOML file.
        only: One or several slugs, as the plan prints them. Left out: all runs.
        force: Repeat finished and failed runs too.
        retry_failed: Repeat failed runs too.
        keep_going: Start further runs after a failure. If not, only those at work are finished.
        dry_run: Print the plan, and start no run.
        engine: "serial", "processes" or "dask".
        workers: Runs at the same time. Left out: as many as fit the machine.
        scheduler: Address of a Dask scheduler, "tcp://…", whose workers do the runs.

    Returns:
        The results folder.

    Raises:
        LocogenError: Something in the study is wrong, or cannot be executed; no run was started.
        StudyFailed: In the end, when runs have failed.
    """
    if workers is not None and workers < 1:
        raise LocogenError(f"workers is {workers}: give a whole number from 1 up")
    show_any_text()
    title, results, runs = read_study(path)
    selection = _select(runs, only)
    if dry_run:
        plan = _plan(title, results, selection, force, retry_failed)
        _show_plan(plan)
        if scheduler is None:  # the workers of a scheduler are machines of their own
            _show_missing_device(plan)
        return results

    with writing(results):
        results.mkdir(parents=True, exist_ok=True)
    with locked(results):
        # Not before: another process may have finished some of the runs until it gave up the lock.
        plan = _plan(title, results, selection, force, retry_failed)
        _show_plan(plan)
        failed_before = _failed_before(plan)
        failed: dict[str, str] = {}
        if plan.todo:
            _write_study_file(title, results, runs)
            with _started(plan, engine, workers, scheduler) as (board, started_engine):
                failed = _execute(plan, board, started_engine, keep_going)
    if failed or failed_before:
        remedy = "call it again" if retry_failed else "add --retry failed"
        raise StudyFailed(_summary(len(selection), failed, failed_before, remedy))
    return results


# --- what there is to do -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A run that was asked for, and whether it has to be done."""

    run: Planned
    state: str  # before anything was started
    is_todo: bool


@dataclass(frozen=True)
class _Plan:
    """The runs of a study that were asked for, and what runs like them have cost."""

    title: str
    results: Path
    entries: Sequence[_Entry]
    costs: Costs

    @property
    def todo(self) -> list[Planned]:
        """The runs that have to be done."""
        return [entry.run for entry in self.entries if entry.is_todo]


def _select(runs: Sequence[Planned], only: str | Iterable[str] | None) -> list[Planned]:
    """The runs with these slugs, in the order of the study; None: all."""
    if only is None:
        return list(runs)
    if isinstance(only, str):
        only = [only]
    selected = list(only)
    by_slug = {run.slug: run for run in runs}
    for slug in selected:
        if slug not in by_slug:
            raise unknown("run", slug, list(by_slug))
    return [run for slug, run in by_slug.items() if slug in selected]


def _plan(
    title: str, results: Path, runs: Sequence[Planned], force: bool, retry_failed: bool
) -> _Plan:
    repeated = {"new", "outdated"}
    if retry_failed:
        repeated |= {"failed"}
    if force:
        repeated |= {"failed", "done"}
    entries: list[_Entry] = []
    for run in runs:
        state = run.state
        entries.append(_Entry(run, state, is_todo=state in repeated))
    return _Plan(title, results, entries, Costs(results))


def _failed_before(plan: _Plan) -> dict[str, str]:
    """Slug → error of the runs that failed in an earlier call and are not tried again."""
    errors: dict[str, str] = {}
    for entry in plan.entries:
        if entry.state == "failed" and not entry.is_todo:
            record = load_json(entry.run.folder / "error.json")
            errors[entry.run.slug] = first_line(str(record.get("error", "")))
    return errors


def _write_study_file(title: str, results: Path, runs: Sequence[Planned]) -> None:
    """Leave what the pages need to know of the study as a whole."""
    # The paths among the runs' parameters start at `base`; relative, so that results can be moved.
    base = Path(os.path.relpath(runs[0].base, results)).as_posix()
    slugs = [run.slug for run in runs]
    write_json(results / "study.json", {"title": title, "base": base, "runs": slugs})


def _summary(
    total: int, failed: Mapping[str, str], failed_before: Mapping[str, str], remedy: str
) -> str:
    errors = {**failed_before, **failed}
    lines = "".join(f"\n  {slug}: {error}" for slug, error in errors.items())
    before = f", {len(failed_before)} of them before" if failed_before else ""
    return f"{len(errors)} of {total} runs failed{before}; {remedy} to repeat them:{lines}"


# --- the plan in words ---------------------------------------------------------------------------


def _show_plan(plan: _Plan) -> None:
    """Print the runs, their states, and what they will cost as far as that can be estimated."""
    todo = plan.todo
    runs = _counted(len(plan.entries), "run")
    print(f"{plan.title}: {runs}, {len(todo)} to do, into {plan.results}", flush=True)
    width = max(len(entry.run.slug) for entry in plan.entries)
    for entry in plan.entries:
        line = f"  {entry.run.slug:{width}}  {entry.state}"
        if entry.is_todo:
            if entry.state in ("done", "failed"):
                line += " (again)"
            line += _cost(entry.run, plan.costs)
        print(line, flush=True)
    if todo:
        print(_totals(plan), flush=True)


def _show_missing_device(plan: _Plan) -> None:
    """Say in a line that this machine could not execute the plan: it may be meant for another."""
    from locogen.studies.engines import missing_device

    reason = missing_device(plan.todo)
    if reason:
        print(f"cannot run here: {reason}", flush=True)


def _cost(run: Planned, costs: Costs) -> str:
    """The pictures and the time of a run as the last column of its line, as far as known."""
    parts: list[str] = []
    pictures = costs.pictures(run)
    if pictures:
        parts.append(_counted(pictures, "picture"))
    seconds = costs.seconds(run)
    if seconds:
        parts.append(f"about {duration(seconds)}")
    return f"  {', '.join(parts)}" if parts else ""


def _counted(count: int, noun: str) -> str:
    """The count with its noun: 1 run, 2 runs."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _totals(plan: _Plan) -> str:
    """The pictures to make in all, those that the store holds, and the time in one worker."""
    todo = plan.todo
    each = [plan.costs.pictures(run) for run in todo]
    counts = [count for count in each if count is not None]
    unknown_runs = len(each) - len(counts)
    more = ""
    if unknown_runs:
        more = f" and those of {_counted(unknown_runs, 'more run')}, not yet known"

    stored = len(list((plan.results / "store").glob("*.png")))
    seconds = plan.costs.left(todo, 1)
    time = "no run like these has been timed yet"
    if seconds is not None:
        time = f"about {duration(seconds)} in one worker"
    return f"to make: {_counted(sum(counts), 'picture')}{more}; the store holds {stored}; {time}"


# --- the runs at work ----------------------------------------------------------------------------


@contextlib.contextmanager
def _started(
    plan: _Plan, name: str, workers: int | None, scheduler: str | None
) -> Iterator[tuple[Board, Engine]]:
    """Start the engine, and the board that shows a person how far the study is."""
    from locogen.studies.engines import opened
    from locogen.studies.kernel import silence
    from locogen.studies.progress import Board

    try:
        todo = plan.todo
        with silence(), opened(name, todo, workers, scheduler) as engine:
            count = engine.workers or "no worker yet, so none"
            threads = f" (threads of each: {engine.threads})" if engine.threads else ""
            print(f"{name}: {count} at once{threads}", flush=True)
            with Board(plan.results, todo, engine.workers, plan.costs) as board:
                yield board, engine
    finally:
        # A Dask worker that was stopped in the middle could not do it itself.
        remove_leftovers(plan.results)


_Waiting = dict[Future[Outcome], Planned]  # what is at work, in the order of the plan


def _execute(plan: _Plan, board: Board, engine: Engine, keep_going: bool) -> dict[str, str]:
    """Submit every run and wait for their ends; slug → error of those that failed."""
    failed: dict[str, str] = {}
    left = {run.slug: run for run in plan.todo}
    waiting = _submit(plan, engine)
    try:
        while waiting:
            failed |= _failed_since(waiting, left, board, engine)
            if failed and not keep_going:
                _hold(waiting, board)
            board.refresh()
    except KeyboardInterrupt:
        stopped = board.stopped() or "stopped"
        board.print(
            f"{stopped}\nleft: {_unfinished(left)}. Run the same command again to continue."
        )
        _stop(plan.results, waiting)
        raise
    except BaseException:
        _stop(plan.results, waiting)
        raise
    was_held = bool(failed) and not keep_going
    return failed | _never_ended(left, was_held, board)


def _failed_since(
    waiting: _Waiting, left: dict[str, Planned], board: Board, engine: Engine
) -> dict[str, str]:
    """Take the runs that have ended off both lists; slug → error of those that failed."""
    failed: dict[str, str] = {}
    for run, outcome in _ended(waiting, engine):
        del left[run.slug]
        board.finish(run, outcome)
        if outcome.error:
            failed[run.slug] = outcome.error
    return failed


def _submit(plan: _Plan, engine: Engine) -> _Waiting:
    return {engine.executor.submit(run_one, run, engine.threads): run for run in plan.todo}


def _ended(waiting: _Waiting, engine: Engine) -> Iterator[tuple[Planned, Outcome]]:
    """Wait half a second at most; take out the runs that have ended, with what became of them."""
    ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
    # In the order in which they were submitted, which a set does not keep.
    for future in [future for future in waiting if future in ended]:
        run = waiting.pop(future)
        if not future.cancelled():
            yield run, _outcome(future, run, engine)


def _outcome(future: Future[Outcome], run: Planned, engine: Engine) -> Outcome:
    """What became of a run; if all workers that tried it died, it has failed."""
    try:
        return future.result()
    except engine.lost:
        return give_up(run, "its worker died again and again, most often because memory ran out")


def _hold(waiting: _Waiting, board: Board) -> None:
    """Cancel the runs that have not begun.

    Dask cancels a future even while it is at work, so the folders say which have begun.
    """
    begun = board.at_work()
    for future, run in waiting.items():
        if run.slug not in begun:
            future.cancel()


def _stop(results: Path, waiting: _Waiting) -> None:
    """End all runs: a kernel stops when its folder is gone."""
    futures = list(waiting)
    for future in futures:
        future.cancel()
    # Again and again: a run could have begun, and made its folder, after the first look.
    while futures:
        remove_leftovers(results)
        futures = list(wait(futures, timeout=0.2).not_done)


def _unfinished(left: Mapping[str, Planned]) -> str:
    """The slugs of runs that are left; some may have ended since anybody looked."""
    return ", ".join(slug for slug, run in left.items() if run.state not in ("done", "failed"))


def _never_ended(left: Mapping[str, Planned], was_held: bool, board: Board) -> dict[str, str]:
    """Explain why some runs did not end: slug → error of those that count as failed.

    Args:
        left: The runs of which no end is known.
        was_held: Whether they were canceled here, after another run had failed.
        board: Where a person reads about it.
    """
    if left and was_held:
        slugs = ", ".join(left)
        board.print(
            f"stopped at the first failure; left: {slugs}. Use --keep-going to run them too."
        )
        return {}
    # Nobody canceled them here, so it was Dask: it cancels everything when its scheduler is lost.
    # What a worker published before that counts.
    message = (
        "not finished: the Dask scheduler, or the connection to it, was lost. "
        "Run the same command again"
    )
    return {slug: message for slug, run in left.items() if run.state != "done"}

# SPDX-License-Identifier: Apache-2.0
"""Write the conformance report from the results of the runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tests.kubernetes.suite.results import PASSED, SKIPPED, Outcome, Run, Undefined
from tests.kubernetes.suite.selections import NOT_RUN, SELECTIONS, named

_HEAD = """\
# Conformance

Results of the official external-storage suite of Kubernetes (`e2e.test`) with this driver, deployed by its chart in
a cluster of real components on one machine, over the embedded storage manager. `python -m tests.kubernetes.suite
report` writes this page from the results of the runs. The definitions in `tests/kubernetes/suite/definitions` state the
capabilities of the driver, from which the suite derives its tests.
"""


def markdown(runs: Sequence[Run]) -> str:
    """Return the page."""
    parts = [_HEAD, *_overview(runs), *_not_run(runs), *_undefined(runs)]
    for run in runs:
        parts.extend(_details(run))
    return "\n".join(parts).rstrip() + "\n"


def _overview(runs: Sequence[Run]) -> Iterator[str]:
    yield "| selection | what | passed | failed | skipped | minutes | when |"
    yield "|---|---|---|---|---|---|---|"
    for run in runs:
        passed, failed, skipped = len(run.ended(PASSED)), len(run.failed()), len(run.ended(SKIPPED))
        when = run.began.partition("T")[0]
        yield (
            f"| [{run.selection}](#{run.selection}) | {named(run.selection).title} | {passed} | {failed} | {skipped} "
            f"| {run.seconds / 60:.1f} | {when} |"
        )
    total = (
        sum(len(run.ended(PASSED)) for run in runs),
        sum(len(run.failed()) for run in runs),
        sum(len(run.ended(SKIPPED)) for run in runs),
    )
    minutes = sum(run.seconds for run in runs) / 60
    yield f"| **all** | | **{total[0]}** | **{total[1]}** | **{total[2]}** | {minutes:.0f} | |"
    yield ""
    # Without the commit: each selection has its own, and the day tells.
    versions = {f"{name} {version.partition(' (')[0]}" for run in runs for name, version in run.versions.items()}
    yield f"With {', '.join(sorted(versions))}."
    yield ""
    if missing := [
        f"{each.name} ({each.title})" for each in SELECTIONS if each.name not in {r.selection for r in runs}
    ]:
        yield f"No result is at hand of these selections: {', '.join(missing)}."
        yield ""


def _not_run(runs: Sequence[Run]) -> Iterator[str]:
    """Name every test that the suite defines with some definition, and that no selection ran."""
    ran: defaultdict[str, set[str]] = defaultdict(set)
    there: defaultdict[str, set[str]] = defaultdict(set)
    for run in runs:
        definition = named(run.selection).definition
        ran[definition].update(test.name for test in run.tests)
        there[definition].update(test.name for test in run.tests)
        there[definition].update(run.filtered)
    reasons: defaultdict[str, set[str]] = defaultdict(set)
    for definition, names in there.items():
        for name in names - ran[definition]:
            if reason := reason_left_out(name, definition):
                reasons[reason].add(f"{name} (definition {definition})")
    if reasons:
        yield "## Not run\n"
        yield from _by_reason(reasons)


def reason_left_out(name: str, definition: str) -> str:
    """Return why no selection runs a test; nothing where a run with another definition covers it."""
    for entry in NOT_RUN:
        if entry.meets(name, definition):
            return entry.reason
    return ""


def _undefined(runs: Sequence[Run]) -> Iterator[str]:
    """Name what no definition of the driver has tests for, with the reason that the first of them met."""
    by_definition: defaultdict[str, dict[tuple[str, str], Undefined]] = defaultdict(dict)
    for run in runs:
        for entry in run.undefined:
            by_definition[named(run.selection).definition].setdefault((entry.suite, entry.pattern), entry)
    if not by_definition:
        return
    first, *others = by_definition.values()
    reasons: defaultdict[str, set[str]] = defaultdict(set)
    for (suite, pattern), entry in first.items():
        if all((suite, pattern) in other for other in others):
            reasons[entry.reason].add(f"{suite}, {pattern}")
    yield "## Patterns without tests\n"
    yield "In the suite's own words; what one of the definitions has tests for is not listed.\n"
    yield from _by_reason(reasons)


def _by_reason(reasons: dict[str, set[str]]) -> Iterator[str]:
    for reason, names in sorted(reasons.items()):
        yield f"* {_plain(reason)}"
        yield from (f"  * {_plain(name)}" for name in sorted(names))
    yield ""


def _details(run: Run) -> Iterator[str]:
    yield f"## {run.selection}\n"
    yield f"{named(run.selection).title}; {run.began}, definition `{named(run.selection).definition}`.\n"
    if failed := run.failed():
        yield "### Failed\n"
        yield from (f"* {_plain(test.name)}: {_plain(_first(test))}" for test in failed)
        yield ""
    if skipped := run.ended(SKIPPED):
        yield "### Skipped by the suite itself\n"
        reasons: defaultdict[str, set[str]] = defaultdict(set)
        for test in skipped:
            reasons[_first(test)].add(test.name)
        yield from _by_reason(reasons)
    if passed := run.ended(PASSED):
        yield "### Passed\n"
        yield from _listed(passed)
    yield from _driver(run)


def _listed(tests: Iterable[Outcome]) -> Iterator[str]:
    patterns: defaultdict[str, list[str]] = defaultdict(list)
    for test in tests:
        pattern, _, rest = test.name.partition("] ")
        patterns[pattern.removeprefix("[Testpattern: ")].append(f"{rest} ({test.seconds:.0f} s)")
    for pattern, names in sorted(patterns.items()):
        yield f"* {_plain(pattern)}"
        yield from (f"  * {_plain(name)}" for name in sorted(names))
    yield ""


def _driver(run: Run) -> Iterator[str]:
    """Summarise the driver's log."""
    calls = run.calls
    if calls.answered:
        yield "### Calls of the driver meanwhile\n"
        yield "| call | answered | slowest (s) |"
        yield "|---|---|---|"
        for call, count in calls.answered.items():
            yield f"| {call} | {count} | {calls.slowest_s[call]:.2f} |"
        yield ""
    if calls.refused:
        yield "Answers other than OK:\n"
        yield from (f"* {e.count} x {e.call}, {e.code}: {_plain(e.message)}" for e in calls.refused)
        yield ""
    if calls.warnings:
        yield "Other warnings:\n"
        yield from (f"* {count} x {_plain(message)}" for message, count in calls.warnings.items())
        yield ""


def _first(test: Outcome) -> str:
    return test.reason.strip().splitlines()[0].strip() if test.reason.strip() else test.state


def _plain(text: str) -> str:
    """Keep Markdown from reading signs in names as its own."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, "\\" + sign)
    return text

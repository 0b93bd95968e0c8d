# SPDX-License-Identifier: Apache-2.0
"""Run the external-storage suite against the driver in the test cluster: `python -m tests.kubernetes.suite --help`."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from csi_driver import driver_version
from tests.kubernetes.suite import driver_log, report, results
from tests.kubernetes.suite.cluster import ENTER, REPOSITORY, Cluster, NoCluster, revision
from tests.kubernetes.suite.selections import HERE, NAMES, SELECTIONS, Selection, left_out, named

DRIVER = "nvmesh-csi.excelero.com"
_DONE = "•"  # what ginkgo prints for a test that was carried out
_PROGRESS_S = 15.0
# In the directory of its reports, as ginkgo makes files while it runs.
_GINKGO = 'cd "$1" && shift && exec ginkgo "$@" "$(command -v e2e.test)" -- $SUITE_ARGUMENTS'


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run."""

    cluster: Cluster
    namespace: str
    output: Path
    processes: int
    hours: int
    focus: str

    def directory(self, selection: Selection) -> Path:
        return self.output / selection.name


def main(argv: Sequence[str]) -> int:
    """Run, or report; the status is 1 where a test failed."""
    arguments = _parser().parse_args(argv)
    if arguments.verb == "list":
        for selection in SELECTIONS:
            print(f"{selection.name:13} {selection.title}")
        return 0
    if arguments.verb == "report":
        return _write_report(arguments.output, arguments.document)
    settings = Settings(
        Cluster(arguments.enter),
        arguments.namespace,
        arguments.output,
        arguments.processes,
        arguments.hours,
        arguments.focus,
    )
    try:
        failed = [run(named(name), settings) for name in arguments.selection or NAMES]
    except NoCluster as problem:
        print(f"no cluster to run in: {problem}", file=sys.stderr)
        return 2
    return int(any(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.kubernetes.suite", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="list the selections")
    runs = verbs.add_parser("run", help="run selections, all of them where none is named; status 1 where a test failed")
    runs.add_argument("selection", nargs="*", choices=[*NAMES, []], default=[], metavar="SELECTION")
    runs.add_argument("--enter", type=Path, default=ENTER, help="program that runs its arguments inside the cluster")
    runs.add_argument("--namespace", default="nvmesh-csi", help="where the driver runs")
    runs.add_argument("--processes", type=int, default=4, help="tests at the same time")
    runs.add_argument("--hours", type=int, default=3, help="end a selection after so long")
    runs.add_argument("--focus", default="", help="run what matches this instead, to try again what failed")
    reports = verbs.add_parser("report", help="write the results of the last run of every selection")
    reports.add_argument("--document", type=Path, default=REPOSITORY / ".cache" / "conformance.md")
    for verb in (runs, reports):
        verb.add_argument("--output", type=Path, default=REPOSITORY / ".cache" / "suite", help="where results lie")
    return parser


def run(selection: Selection, settings: Settings) -> int:
    """Run one selection, keep its results, and return how many tests failed."""
    directory = settings.directory(selection)
    directory.mkdir(parents=True, exist_ok=True)
    versions = {"driver": f"{driver_version()} ({revision()})", **settings.cluster.versions(settings.namespace)}
    undefined = _undefined(selection, settings)
    began = datetime.now(UTC)
    print(f"== suite {selection.name}: {selection.title}", flush=True)
    _ginkgo(selection, settings)
    seconds = (datetime.now(UTC) - began).total_seconds()
    document = json.loads((directory / "ginkgo.json").read_text())
    tests, filtered = results.of_driver(document, DRIVER)
    calls = _driver_calls(directory, settings, began)
    ended = results.Run(
        selection.name, began.isoformat(timespec="seconds"), seconds, versions, tests, filtered, undefined, calls
    )
    ended.save(directory / "results.json")
    _say(ended)
    # Nothing carried out is no success: a focus that is out of date would pass for ever.
    return len(ended.failed()) + (0 if ended.ended(results.PASSED) else 1)


def _say(run: results.Run) -> None:
    counts = (len(run.ended(results.PASSED)), len(run.failed()), len(run.ended(results.SKIPPED)))
    print(f"   {counts[0]} passed, {counts[1]} failed, {counts[2]} skipped themselves, {run.seconds / 60:.1f} min")
    for test in run.failed():
        print(f"   FAILED {test.name}: {test.reason.splitlines()[0] if test.reason else test.state}", flush=True)


def _ginkgo(selection: Selection, settings: Settings) -> None:
    """Run ginkgo and show how far it is; its report has the result."""
    directory = settings.directory(selection)
    for name in ("ginkgo.json", "junit.xml"):
        (directory / name).unlink(missing_ok=True)
    skip = "|".join([selection.skip, *(entry.pattern for entry in left_out(selection.definition))])
    focus = settings.focus or selection.focus
    processes = settings.processes if selection.side_by_side else 1
    argv = settings.cluster.command(
        "sh", "-c", _GINKGO, "sh", str(directory),
        f"--procs={processes}", f"--focus={focus}", f"--skip={skip}", f"--timeout={settings.hours}h", "--no-color",
        "--silence-skips", f"--output-dir={directory}", "--json-report=ginkgo.json", "--junit-report=junit.xml",
    )  # fmt: skip
    environment = {
        **os.environ,
        **_login(selection, settings.cluster),
        "SUITE_ARGUMENTS": " ".join(_suite_arguments(selection, settings.cluster)),
    }
    with (directory / "ginkgo.log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
        try:
            _watch(process, directory / "ginkgo.log", selection.name)
        finally:
            process.terminate()
            process.wait()
    if not (directory / "ginkgo.json").exists():
        raise NoCluster(f"the suite wrote no report; its last words: {(directory / 'ginkgo.log').read_text()[-2000:]}")


def _suite_arguments(selection: Selection, cluster: Cluster) -> list[str]:
    return [
        "-provider=local",
        f"-num-nodes={len(cluster.nodes())}",
        f"-repo-root={HERE}",
        f"-storage.testdriver={selection.definition_file}",
        "-kubelet-root-dir=/var/lib/kubelet",
        "-dump-logs-on-failure=false",
    ]


def _login(selection: Selection, cluster: Cluster) -> dict[str, str]:
    """Return what lets tests that stop the kubelet log in to the node."""
    if not selection.logs_in:
        return {}
    return {"KUBE_SSH_USER": "root", "LOCAL_SSH_KEY": os.environ.get("LOCAL_SSH_KEY") or cluster.login_key()}


def _undefined(selection: Selection, settings: Settings) -> list[results.Undefined]:
    """Ask the suite for which patterns it defines no tests with this driver."""
    said = settings.cluster.output(
        "e2e.test", "-ginkgo.dry-run", "-ginkgo.focus=External.Storage", *_suite_arguments(selection, settings.cluster),
        environment={"DEBUG_STORAGE_TESTSUITE": "1"},
    )  # fmt: skip
    return results.undefined(said, DRIVER)


def _watch(process: subprocess.Popen[bytes], log: Path, name: str) -> None:
    """Print how many tests have ended, now and then, until the process ends."""
    began_s = time.monotonic()
    shown, next_s = -1, began_s + _PROGRESS_S
    while process.poll() is None:
        time.sleep(1)
        text = log.read_text(errors="replace")
        total = re.search(r"Will run (\d+) of", text)
        done = text.count(_DONE)
        if total and done != shown and time.monotonic() >= next_s:
            failed = len(re.findall(r"^• \[[A-Z]+\]", text, re.MULTILINE))
            minutes = (time.monotonic() - began_s) / 60
            print(
                f"   {name}: {done} of at most {total[1]} carried out, {failed} failed, {minutes:.1f} min", flush=True
            )
            shown, next_s = done, time.monotonic() + _PROGRESS_S


def _driver_calls(directory: Path, settings: Settings, began: datetime) -> driver_log.Calls:
    logs = settings.cluster.log_since(settings.namespace, began.strftime("%Y-%m-%dT%H:%M:%SZ"))
    for name, lines in logs.items():
        (directory / f"{name}.log").write_text("\n".join(lines) + "\n")
    own = (line for name, lines in logs.items() if not name.rpartition(".")[2].startswith("csi-") for line in lines)
    return driver_log.read(own)


def _write_report(output: Path, document: Path) -> int:
    runs = [results.load(output / name / "results.json") for name in NAMES if (output / name / "results.json").exists()]
    document.write_text(report.markdown(runs))
    print(f"wrote {document}")
    return int(any(run.failed() for run in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""Commands that documents tell people to run can be run: the program, helm, kubectl and make know their words."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

import pytest
import yaml

from csi_driver.config import COMMANDS, command_class, parse
from csi_driver.config.command import UsageError, flags_of
from tests.documents import NAMES, ROOT, code, fenced, text_of, unfenced
from tests.unit.chart.rendering import CHART, NVMESH, helm, render

PROGRAMS = ("nvmesh-csi", "helm", "kubectl", "make")
KUBECTL: Mapping[str, frozenset[str]] = {
    verb: frozenset(flags.split())
    for verb, flags in {
        "apply": "--filename --kustomize --server-side -f -k",
        "auth": "--as",
        "create": "--from-literal --from-file --namespace -n",
        "cordon": "",
        "delete": "--filename --ignore-not-found --namespace -f -n --cascade",
        "describe": "--namespace -n",
        "drain": "--ignore-daemonsets --delete-emptydir-data",
        "exec": "--namespace --container -n -c",
        "get": "--namespace --output --all-namespaces --field-selector --selector --sort-by --raw -n -o -A -L -l -w",
        "label": "--overwrite --namespace -n",
        "nvmesh": "--namespace --output --tree --node --nodes --yes --bundle --unsearched --context -n -o",
        "logs": "--namespace --container --since --previous --prefix --selector -n -c -l",
        "patch": "--type --patch --namespace -n -p",
        "port-forward": "--namespace -n",
        "rollout": "--namespace -n",
        "scale": "--replicas --namespace -n",
        "taint": "",
        "uncordon": "",
        "wait": "--for --timeout --namespace -n",
    }.items()
}
_OF_A_RELEASE = (
    "--namespace --create-namespace --set --values --reset-then-reuse-values --install --take-ownership "
    "--force-conflicts -n -f"
)
HELM: Mapping[str, frozenset[str]] = {
    verb: frozenset(flags.split())
    for verb, flags in {
        "install": _OF_A_RELEASE,
        "upgrade": _OF_A_RELEASE,
        "template": f"{_OF_A_RELEASE} --api-versions",
        "rollback": "--namespace -n",
        "uninstall": "--namespace -n",
        "get": "--namespace -n",
        "test": "--namespace -n --logs --timeout",
        "show": "",
        "lint": "--values --set -f",
    }.items()
}
Words = Sequence[str]


def lines_of(text: str) -> Iterator[Words]:
    """Yield the commands of the shell blocks, each as its words; pipes and lists are taken apart."""
    for block in fenced(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _simple_commands(shlex.split(line, comments=True))


def spans_of(text: str) -> Iterator[Words]:
    """Yield the commands in running text, which may omit required flags."""
    for span in code(unfenced(text)):
        if span.split(" ")[0] in PROGRAMS and " " in span:
            yield from _simple_commands(shlex.split(span))


def _simple_commands(words: Words) -> Iterator[Words]:
    command: list[str] = []
    for word in [*words, ";"]:
        if word in ("|", ";", "&&", "||", ">"):
            yield from _one(command)
            command = []
        else:
            command.append(word)


def _one(command: list[str]) -> Iterator[Words]:
    while command and (command[0] == "sudo" or re.match(r"\w+=", command[0])):
        command = command[1:]
    if not command:
        return
    name = PurePath(command[0]).name
    if name == "kubectl" and "--" in command:
        inner = command.index("--")
        yield from _one(command[inner + 1 :])
        command = command[:inner]
    yield [name, *command[1:]]


def flags_in(words: Words) -> list[str]:
    return [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


def problems(words: Words, *, is_whole: bool) -> list[str]:
    """Return the problems of a command."""
    match words[0]:
        case "nvmesh-csi":
            return _of_the_program(words[1:], is_whole=is_whole)
        case "kubectl":
            return _of_a_table(KUBECTL, words[1:])
        case "helm":
            return _of_a_table(HELM, words[1:]) + _of_values(words)
        case "make":
            return _of_make(words[1:])
    return []


def _of_the_program(words: Words, *, is_whole: bool) -> list[str]:
    if is_whole:
        try:
            parse(words, {})
        except UsageError as refused:
            return list(refused.problems)
        return []
    known = {*flags_of(command_class(words[0])), "--help"}
    unknown = [flag for flag in flags_in(words) if flag not in known]
    return unknown if words[0] in COMMANDS or words[0].startswith("[") else [words[0]]


def _of_a_table(table: Mapping[str, frozenset[str]], words: Words) -> list[str]:
    """Return words that a client does not know. Flags of all its verbs may precede the verb."""
    verbs = [word for word in words if word in table]
    if not verbs:
        return [f"{' '.join(words)} has no verb that is known"]
    return [flag for flag in flags_in(words) if flag not in table[verbs[0]]]


def _of_values(words: Words) -> list[str]:
    """Return the values that are set and that the chart does not have."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    pairs = itertools.pairwise(words)
    return [one for flag, one in pairs if flag == "--set" and not _is_there(values, one.partition("=")[0].split("."))]


def _is_there(values: object, path: list[str]) -> bool:
    return not path or (isinstance(values, dict) and path[0] in values and _is_there(values[path[0]], path[1:]))


def _of_make(words: Words) -> list[str]:
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    return [word for word in words if "=" not in word and word not in [*targets, "TARGET"]]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_in_a_document_is_known(name: str) -> None:
    text = text_of(name)
    wrong = [(" ".join(words), problems(words, is_whole=True)) for words in lines_of(text)]
    wrong += [(" ".join(words), problems(words, is_whole=False)) for words in spans_of(text)]
    assert [(words, what) for words, what in wrong if what] == []


# docs/clusters.md contains keys of the older drivers, some with the same spelling.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/clusters.md"])
def test_every_value_of_the_chart_that_a_document_names_is_there(name: str) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    spans = [span.partition(":")[0] for span in code(unfenced(text_of(name))) if not span.endswith(".yaml")]
    # events.k8s.io is a group of the API, events.enabled a value.
    named = [span.split(".") for span in spans if re.fullmatch(r"[a-z]\w+(\.\w+)+(?<!\.k8s\.io)", span)]
    of_the_chart = [path for path in named if path[0] in values]
    assert [path for path in of_the_chart if not _is_there(values, path) and "flags" not in path] == []


RELEASES = [
    pytest.param(words, id=f"{name}-{number}")
    for name in NAMES
    for number, words in enumerate(lines_of(text_of(name)))
    if words[0] == "helm" and words[1] in ("install", "upgrade") and "--reset-then-reuse-values" not in words
]
VALUES = [
    pytest.param(block, id=str(number)) for number, block in enumerate(fenced(text_of("docs/install.md"), "yaml"), 1)
]


@pytest.mark.tool
@pytest.mark.skipif(helm() is None, reason="needs helm: tests/tools/install-helm")
@pytest.mark.parametrize("words", RELEASES)
def test_every_release_in_a_document_can_be_rendered(words: Words) -> None:
    for_a_cluster = ("--install", "--create-namespace", "--take-ownership", "--force-conflicts")
    given = [word.replace("NODE", "node-1") for word in words[2:] if word not in for_a_cluster]
    done = subprocess.run([str(helm()), "template", *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.tool
@pytest.mark.skipif(helm() is None, reason="needs helm: tests/tools/install-helm")
@pytest.mark.parametrize("block", VALUES)
def test_every_example_of_values_is_taken_by_the_chart(block: str) -> None:
    values = yaml.safe_load(block)
    assert render(*(() if "management" in values else NVMESH), values=values).manifests


@pytest.mark.parametrize(
    "line",
    [
        "nvmesh-csi node --endpoint /s --no-such-flag",
        "nvmesh-csi controller --endpoint /s",
        "kubectl get pods --no-such-flag",
        "kubectl obtain pods",
        "kubectl exec pod -- nvmesh-csi node",
        "helm install a deploy/helm/nvmesh-csi-driver --set no.such=1",
        "helm install a deploy/helm/nvmesh-csi-driver --no-such-flag",
        "sudo make no-such-target",
        "ls | nvmesh-csi obtain",
    ],
)
def test_a_command_that_cannot_be_run_is_found(line: str) -> None:
    assert any(problems(words, is_whole=True) for words in lines_of(f"```sh\n{line}\n```\n"))

# SPDX-License-Identifier: Apache-2.0
"""docs/parameters.md is complete and true: its keys are the code's, and the bounds that it gives are those enforced."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import yaml

from csi_driver import capacity
from csi_driver.config import COMMANDS, command_class
from csi_driver.config.command import flags_of
from csi_driver.errors import InvalidRequest
from csi_driver.parameters import mount_options, storage_class
from csi_driver.parameters.encryption import PASSPHRASE_KEYS, PREVIOUS_KEY
from csi_driver.parameters.mkfs import FILESYSTEMS
from csi_driver.parameters.storage_class import LAYOUT_KEYS, RAID_KEYS, RAID_LEVELS, StorageClassParameters
from tests.documents import NAMES, Row, code, fenced, section, table, text_of
from tests.tools.chart_values import VALUES
from tests.tools.document_tables import fresh

DOCUMENT = text_of("parameters.md")
ROWS = table(section(DOCUMENT, "Parameters"), "parameter", "values")
LEVEL_ROWS = [row for row in ROWS if "level" in row]
KEYED = [pytest.param(key, row, id=key) for row in ROWS for key in code(row["parameter"])]

DEFAULTS = {
    "raidLevel", "stripeWidth", "stripeSize", "numberOfMirrors", "dataBlocks", "parityBlocks", "fsType",
    "csi.storage.k8s.io/fstype", "encryption/headerSize", "encryption/slot", "encryption/numberOfSlots",
    "encryption/keySize",
}  # fmt: skip
"""Parameters with a default of the controller; others use that of mkfs, cryptsetup or the management."""

WITHOUT_XTS = {"encryption": "luks", "encryption/cipher": "aes-cbc-plain64"}

Claim = tuple[Mapping[str, str], list[str], list[str]]
"""Other parameters of a request, and values that are accepted or refused with them."""


def base_of(row: Row) -> Mapping[str, str]:
    """Return the parameters that another parameter requires."""
    if "level" in row and row["level"] != "every":
        return {"raidLevel": code(row["level"])[0]}
    word = next((word for word in ("native", "luks") if f"`{word}`" in row["meaning"]), "")
    is_older = row["parameter"].startswith("`dmcrypt/")
    shared = code(row["parameter"])[0] in ("encryption/keySize", "encryption/allowDiscards")
    if word and row["parameter"] != "`encryption`":
        return {"encryption": word}
    return {"encryption": "luks" if is_older else "native"} if is_older or shared else {}


def claims(key: str, row: Row) -> Iterator[Claim]:
    """Yield accepted and refused values of a row, with the required parameters."""
    said, base = row["values"], base_of(row)
    for pattern, claim in _CLAIMS:
        for found in re.finditer(pattern, said):
            beside, accepted, refused = claim(*found.groups())
            yield {**base, **beside}, accepted, refused
    if re.fullmatch(r"`[^`]+`(, `[^`]+`)*", said):
        yield base, code(said), ["no-such-word"]


def _range(word: str | None, least: str, most: str) -> Claim:
    beside = {"encryption": word} if word else {}
    return beside, [least, most], [str(int(least) - 1), str(int(most) + 1)]


_CLAIMS: Sequence[tuple[str, Callable[..., Claim]]] = (
    (r"(?:`(luks)`: )?(\d+) to (\d+)", _range),
    (r"with `(ec)` (\d+)", lambda level, only: ({"raidLevel": level}, [only], [str(int(only) + 1)])),
    (r"with `(vpg)` (\d+)", lambda vpg, only: ({vpg: "g"}, [only], [str(int(only) + 1)])),
    (r"`(native|luks)`: (\d+), (\d+)", lambda word, one, two: ({"encryption": word}, [one, two], ["384"])),
    (r"without xts (\d+) up to (\d+)", lambda least, most: (WITHOUT_XTS, [least, most, "192"], ["64", "200", "1088"])),
    (r"at most (\d+) letters", lambda most: ({}, ["a" * int(most)], ["a" * (int(most) + 1), "a b"])),
    (r"at most (\d+) characters", lambda most: ({}, ["-".ljust(int(most), "x")], ["-".ljust(int(most) + 1, "x")])),
    (r"separated by (commas)", lambda _: ({}, ["a", "a,b"], ["a,,b"])),
    (r"(a cipher)", lambda _: ({}, ["aes-xts-plain64"], ["AES XTS"])),
    (r"(power of two)", lambda _: ({}, ["8192"], ["12288"])),
)


def test_every_parameter_of_the_code_is_in_the_document_and_no_other() -> None:
    documented = [key for row in ROWS for key in code(row["parameter"])]
    assert sorted(documented) == sorted(storage_class.KNOWN_KEYS | {"csi.storage.k8s.io/fstype"})


@pytest.mark.parametrize(("key", "row"), KEYED)
def test_the_values_that_the_document_gives_are_those_that_are_taken(key: str, row: Row) -> None:
    said = list(claims(key, row))
    assert said or key in ("domain", "raidLevel", "dmcrypt/cipher"), f"nothing is said of the values of {key}"
    for base, accepted, refused in said:
        for value in accepted:
            storage_class.parse({**base, key: value})
        for value in refused:
            with pytest.raises(InvalidRequest):
                storage_class.parse({**base, key: value})


def test_every_level_takes_what_the_document_says() -> None:
    said = {
        key: {RAID_LEVELS[word] for word in code(row["level"])} for row in LEVEL_ROWS for key in code(row["parameter"])
    }
    layout = {key: levels for key, levels in said.items() if levels}
    assert layout == {key: {level for level in RAID_LEVELS.values() if key in RAID_KEYS[level]} for key in LAYOUT_KEYS}


def test_the_words_of_the_levels_are_those_that_are_taken() -> None:
    rows = table(DOCUMENT, "level", "words of `raidLevel`")
    assert {word: row["level"] for row in rows for word in code(row["words of `raidLevel`"])} == RAID_LEVELS


@pytest.mark.parametrize(("key", "row"), [case for case in KEYED if case.id in DEFAULTS])
def test_a_default_that_the_document_gives_changes_nothing_where_it_is_written_out(key: str, row: Row) -> None:
    default = row["default"].strip("`")
    base = base_of(row)
    for level in code(row.get("level", "")) or [""]:
        beside = {**base, "raidLevel": level} if level else base
        written = "1" if key == "stripeWidth" and level == "ec" else default
        assert _effect({**beside, key: written}) == _effect(beside)


def _effect(given: Mapping[str, str]) -> object:
    """Return the parsed parameters: layout, and the rest."""
    read = storage_class.parse(given)
    assert read.spec.layout is not None
    rest = dataclasses.replace(
        read, spec=dataclasses.replace(read.spec, layout=None), recorded={}, context={}, fs_type=read.fs_type or "ext4"
    )
    return _sums(read), rest


def _sums(read: StorageClassParameters) -> tuple[int, int, tuple[int, int]]:
    layout = read.spec.layout
    assert layout is not None
    return capacity.granule_bytes(layout), capacity.usable_bytes(1 << 40, layout), capacity.stripes_of(layout)


def test_what_can_be_changed_later_is_what_the_document_says() -> None:
    later = {key for row in ROWS if row["later"] == "yes" for key in code(row["parameter"])}
    assert later == storage_class.MUTABLE_KEYS
    rows = table(DOCUMENT, "key", "not possible for")
    assert {key for row in rows for key in code(row["key"])} == storage_class.MUTABLE_KEYS
    of_groups = {key for row in rows if "`vpg`" in row["not possible for"] for key in code(row["key"])}
    for key in storage_class.MUTABLE_KEYS:
        value = {"relativeRebuildPriority": "3", "enableCrcCheck": "true"}.get(key, "a")
        if key in of_groups:
            with pytest.raises(InvalidRequest, match="provisioning group"):
                storage_class.with_mutable({"vpg": "g"}, {key: value})
        else:
            assert storage_class.with_mutable({"vpg": "g"}, {key: value})[key] == value


def test_what_is_refused_on_purpose_is_refused_with_its_reason() -> None:
    rows = table(section(DOCUMENT, "Refused parameters"), "parameter")
    refused = [key for row in rows for key in code(row["parameter"])]
    assert set(refused) == storage_class.THIN_KEYS | {"isEncrypted"}
    for key in refused:
        with pytest.raises(InvalidRequest, match=r"thin volume|encryption: native"):
            storage_class.parse({key: "x"})


def test_the_attributes_of_a_persistent_volume_are_those_that_the_node_reads() -> None:
    documented = {key for row in table(DOCUMENT, "attribute") for key in code(row["attribute"])}
    assert documented == {*storage_class.CONTEXT_KEYS, "fsType"}


def test_the_keys_of_secrets_are_those_that_are_read() -> None:
    text = section(DOCUMENT, "Secrets")
    assert {*PASSPHRASE_KEYS, *PASSPHRASE_KEYS, PREVIOUS_KEY} <= set(code(text))
    management = yaml.safe_load(VALUES.read_text())["management"]
    assert {management["usernameKey"], management["passwordKey"], management["tls"]["caKey"]} <= set(code(text))


@pytest.mark.parametrize("name", NAMES)
def test_storage_classes_in_documents_have_parameters_that_are_taken(name: str) -> None:
    for block in fenced(text_of(name), "yaml"):
        for made in yaml.safe_load_all(block):
            classes = made.get("storageClasses", []) + [made] * (made.get("kind") == "StorageClass")
            for each in classes:
                storage_class.parse({key: str(value) for key, value in each.get("parameters", {}).items()})


def test_mount_options_are_treated_as_the_document_says() -> None:
    rows = table(section(DOCUMENT, "Mount options"), "option")
    for row in rows:
        for text in code(row["option"]):
            option = (f"{text}x1" if text.endswith("=") else text).replace("...", "systemd.requires")
            assert _treated(option) == _said(row[""], option)
    assert [reason for reason in mount_options.REFUSED if not any(reason in row[""] for row in rows)] == []
    unread = {name.rstrip("=") for row in rows if "an ignored journal" in row[""] for name in code(row["option"])}
    assert unread == mount_options.NO_REPLAY


def _treated(option: str) -> object:
    try:
        return mount_options.mount_flags([option])
    except InvalidRequest:
        return "refused"


def _said(what: str, option: str) -> object:
    """Return the effect of an option by its row in the document."""
    if "refused for writable mounts" in what:
        return (option,), None
    if "refused" in what:
        return "refused"
    if "dropped" in what:
        return (), None
    return ((), 0o777) if "root directory" in what else ((option,), None)


# --- generated tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parameters.md", "mkfs.md", "doctor.md"])
def test_the_generated_tables_are_fresh(name: str) -> None:
    assert fresh(text_of(name)) == text_of(name), f"docs/{name} is not up to date: run `make docs`"


def test_every_filesystem_has_its_table_of_options() -> None:
    assert re.findall(r"<!-- table: mkfs (\S+) -->", text_of("mkfs.md")) == list(FILESYSTEMS)


def test_every_command_with_flags_has_its_table() -> None:
    tables = re.findall(r"<!-- table: flags (\S+) -->", DOCUMENT)
    assert tables == [command for command in COMMANDS if flags_of(command_class(command))]


@pytest.mark.parametrize("command", [command for command in COMMANDS if flags_of(command_class(command))])
def test_every_flag_with_its_variable_is_in_the_document(command: str) -> None:
    (text,) = re.findall(rf"(?s)<!-- table: flags {command} -->(.*?)<!-- end of table -->", DOCUMENT)
    words = {word for span in code(text) for word in span.split()}
    missing = [
        word
        for flag in flags_of(command_class(command)).values()
        for word in ((flag.name,) if flag.is_positional else (flag.name, flag.variable))
        if word not in (words if word == flag.name else DOCUMENT)
    ]
    assert missing == []
    assert {word for word in words if word.startswith("--")} == {
        flag.name for flag in flags_of(command_class(command)).values() if not flag.is_positional
    }

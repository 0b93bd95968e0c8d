# SPDX-License-Identifier: Apache-2.0
"""Several emulated machines on one private network, for tests that run outside of them: start, run, cut, freeze, kill.

The test process runs in a network namespace of its own (tests/vm/run-machines). Each machine has three network cards:
control (10.7.0.N, never cut; the test is 10.7.0.254) and two storage networks (10.8.0.N, 10.9.0.N). A killed machine
keeps its drive, an emulated NVMe drive that is mounted at /drive, and loses its memory, as after a power failure.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
NETWORKS = (7, 8, 9)
AGENT_PORT = 7000
BOOT_LIMIT_S = 300.0
COMMAND_LIMIT_S = 300.0
_SOURCES = ("csi_driver", "proto", "tests", "pyproject.toml")

_AGENT = """
set -e
for card in /sys/class/net/*; do
    IFS=: read -r _ _ _ network _ number <"$card/address" || continue
    case $network in 0[789]) ip addr add "10.$((10#$network)).0.$((16#$number))/24" dev "${card##*/}"
        ip link set "${card##*/}" up ;; esac
done
hostname NAME
modprobe -a nvme configfs nvmet-tcp nvme-tcp
mount -t configfs configfs /sys/kernel/config
for try in $(seq 100); do drive=$(ls /dev/nvme*n1 2>/dev/null) && break; sleep 0.1; done
blkid -p "$drive" >/dev/null || mkfs.xfs -q "$drive"
mkdir -p /drive
mount "$drive" /drive
exec python -B -S -E tests/vm/agent.py 10.7.0.NUMBER:PORT
"""


class CommandFailed(Exception):
    """A command in a machine ended with another status than 0."""


def until(is_so: Callable[[], object], what: str, limit_s: float = COMMAND_LIMIT_S) -> float:
    """Wait until the callable is true; returns the seconds it took. The limit is for a machine that is very busy."""
    begin_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - begin_s < limit_s, f"waited {limit_s} s for {what}"
        time.sleep(0.1)
    return time.monotonic() - begin_s


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def set_up_networks() -> None:
    """Make the bridges. Refuses to do so in a network namespace that has other networks."""
    own = {line.split(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()[2:]}
    assert own <= {"lo"}, f"not a network namespace of its own: {sorted(own)}"
    _ip("link", "set", "lo", "up")
    for network in NETWORKS:
        _ip("link", "add", f"br{network}", "type", "bridge")
        _ip("link", "set", f"br{network}", "up")
    _ip("addr", "add", "10.7.0.254/24", "dev", "br7")


class Running:
    """A command that runs in a machine. Its lines are kept; `close` ends it."""

    def __init__(self, address: tuple[str, int], argv: Sequence[str], log: Path | None = None) -> None:
        self.lines: list[str] = []
        self.status: int | None = None
        self._log = log
        self._socket = socket.create_connection(address, 30)
        self._socket.settimeout(None)
        self._socket.sendall(json.dumps({"argv": list(argv)}).encode() + b"\n")
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        partial = ""
        for answer in self._answers():
            if "status" in answer:
                self.status = answer["status"]
                break
            *whole, partial = (partial + answer["output"]).split("\n")
            self.lines += whole
            if self._log is not None:
                with self._log.open("a") as log:
                    log.write(answer["output"])
        if partial:
            self.lines.append(partial)

    def _answers(self) -> Iterator[dict[str, Any]]:
        try:
            with self._socket.makefile("r") as stream:
                for line in stream:
                    if line.endswith("\n"):
                        yield json.loads(line)
        except OSError:
            pass  # the machine was killed, or we closed it

    def wait(self, limit_s: float) -> None:
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), f"still running after {limit_s} s; last lines: {self.lines[-5:]}"

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def close(self, *, machine_runs: bool = True) -> None:
        """End the command; all that it printed is in `lines` then."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR if machine_runs else socket.SHUT_RDWR)
        self._thread.join(COMMAND_LIMIT_S)
        self._socket.close()


@dataclass
class Machine:
    """One emulated machine."""

    guest: Path
    directory: Path
    name: str
    number: int
    memory: str = "768M"
    _qemu: subprocess.Popen[bytes] | None = None
    _running: list[Running] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True)
        with (self.directory / "drive").open("wb") as drive:
            drive.truncate(8 << 30)
        for network in NETWORKS:
            _ip("tuntap", "add", "dev", self._link(network), "mode", "tap")
            _ip("link", "set", self._link(network), "master", f"br{network}", "up")

    @property
    def address(self) -> str:
        return f"10.7.0.{self.number}"

    @property
    def log(self) -> Path:
        """What the programs in the machine printed, over all its lives."""
        return self.directory / "log"

    def _link(self, network: int) -> str:
        return f"t{network}-{self.number}"

    # --- power ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Switch the machine on and wait until commands can be run in it."""
        shared = self.directory / "shared"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir()
        with tarfile.open(shared / "project.tar", "w") as tar:
            for source in _SOURCES:
                tar.add(REPOSITORY / source, source, filter=lambda each: None if "__pycache__" in each.name else each)
        command = _AGENT.replace("NAME", self.name).replace("NUMBER", str(self.number))
        (shared / "command").write_text(command.replace("PORT", str(AGENT_PORT)))
        scratch = self.directory / "scratch"
        scratch.unlink(missing_ok=True)
        with scratch.open("wb") as file:
            file.truncate(2 << 30)
        program = self.guest / "qemu/usr"
        argv = [str(program / "bin/qemu-system-x86_64"), "-L", str(program / "share/qemu")]
        argv += ["-L", str(program / "share/seabios"), "-accel", "tcg,thread=multi", "-machine", "q35"]
        argv += ["-cpu", "max,la57=off", "-smp", "1", "-m", self.memory, "-nodefaults", "-no-user-config"]
        argv += ["-no-reboot", "-display", "none", "-serial", f"file:{self.directory / 'console'}"]
        argv += ["-kernel", str(self.guest / "vmlinuz"), "-initrd", str(self.guest / "initrd.gz")]
        for name, image, more in (
            ("root", self.guest / "root.ext4", "readonly=on"),
            ("work", scratch, "cache=unsafe,discard=unmap"),
        ):
            argv += ["-drive", f"if=none,id={name},file={image},format=raw,{more}"]
            argv += ["-device", f"virtio-blk-pci,drive={name}"]
        argv += ["-drive", f"if=none,id=drive,file={self.directory / 'drive'},format=raw,cache=unsafe,discard=unmap"]
        argv += ["-device", f"nvme,drive=drive,serial=DRIVE{self.number}"]
        argv += ["-qmp", f"unix:{self.directory / 'qmp'},server=on,wait=off"]
        argv += ["-fsdev", f"local,id=shared,path={shared},security_model=none,multidevs=remap"]
        argv += ["-device", "virtio-9p-pci,fsdev=shared,mount_tag=shared", "-device", "virtio-rng-pci"]
        for network in NETWORKS:
            argv += ["-netdev", f"tap,id=n{network},ifname={self._link(network)},script=no,downscript=no"]
            mac = f"52:54:00:{network:02}:00:{self.number:02x}"
            argv += ["-device", f"virtio-net-pci,netdev=n{network},mac={mac}"]
        kernel = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable"
        with (self.directory / "qemu").open("ab") as log:
            self._qemu = subprocess.Popen(
                [*argv, "-append", kernel], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        until(self._answers, f"{self.name} to start:\n{self.console()}", BOOT_LIMIT_S)

    def _answers(self) -> bool:
        assert self._qemu is not None
        assert self._qemu.poll() is None, f"{self.name} has ended:\n{self.console()}"
        try:
            return self.run("true", limit_s=30) == ""
        except (OSError, AssertionError, CommandFailed):
            return False

    def console(self) -> str:
        """Return the last lines of the machine's console: a panic stands there."""
        output = (self.directory / "qemu").read_text(errors="replace")
        console = self.directory / "console"
        return output + (console.read_text(errors="replace")[-3000:] if console.exists() else "")

    def kill(self) -> None:
        """Cut the power: nothing that is only in memory survives."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None
        for each in self._running:
            each.close(machine_runs=False)
        self._running.clear()

    def freeze(self) -> None:
        """Stop the processors; the machine's memory and its connections stay as they are."""
        assert self._qemu is not None
        self._qemu.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._qemu is not None
        self._qemu.send_signal(signal.SIGCONT)

    def processor_s(self) -> float:
        """Return the seconds that the machine's processor has worked: other work on this machine does not count."""
        assert self._qemu is not None
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self.directory / "qmp"))
            with monitor.makefile("rw") as stream:
                stream.readline()  # QEMU's greeting
                stream.write('{"execute": "qmp_capabilities"} {"execute": "query-cpus-fast"}\n')
                stream.flush()
                stream.readline()
                thread = json.loads(stream.readline())["return"][0]["thread-id"]
        return int(Path(f"/proc/{self._qemu.pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e9

    # --- cables -----------------------------------------------------------------------------------------------

    def pull(self, *networks: int) -> None:
        """Pull cables: the machine's packets are lost without an answer."""
        for network in networks:
            _ip("link", "set", self._link(network), "down")

    def plug(self, *networks: int) -> None:
        for network in networks:
            _ip("link", "set", self._link(network), "up")

    # --- programs ---------------------------------------------------------------------------------------------

    def begin(self, *argv: str) -> Running:
        """Start a command that goes on while the test does. It ends with the machine, or with `close`."""
        started = Running((self.address, AGENT_PORT), argv, self.log)
        self._running.append(started)
        return started

    def run(self, script: str, *, limit_s: float = COMMAND_LIMIT_S) -> str:
        """Run a shell script and return its output; raises `CommandFailed` when its status is not 0."""
        command = Running((self.address, AGENT_PORT), ["bash", "-c", script])
        try:
            command.wait(limit_s)
        finally:
            command.close()
        output = "\n".join(command.lines)
        if command.status != 0:
            raise CommandFailed(f"{self.name}: {script}: status {command.status}: {output}")
        return output


@dataclass
class Machines:
    """All machines of a test."""

    guest: Path
    directory: Path
    every: list[Machine] = field(default_factory=list)

    def add(self, name: str, memory: str = "768M") -> Machine:
        """Make a machine; `start` switches it on."""
        number = len(self.every) + 1
        self.every.append(Machine(self.guest, self.directory / name, name, number, memory))
        return self.every[-1]

    def close(self) -> None:
        for machine in self.every:
            machine.kill()
            shutil.rmtree(machine.directory / "shared", ignore_errors=True)
            for name in ("drive", "scratch"):
                (machine.directory / name).unlink(missing_ok=True)

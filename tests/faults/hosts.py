"""Two hosts on one machine: network namespaces with a name and an address each, and a cable between them that can be pulled out."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES, ADDRESSES = ("alpha", "beta"), ("10.77.0.1", "10.77.0.2")
_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000  # <sched.h>


@dataclass(frozen=True)
class Hosts:
    """The first is where all meet."""

    spaces: tuple[str, str]
    folder: Path

    def prefix(self, host: int) -> list:
        """Words before a command that is to run there. As on Debian, /etc/hosts gives the host's own name a loopback address."""
        name, table = NAMES[host], self.folder / f"hosts-{host}"
        table.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        return ["ip", "netns", "exec", self.spaces[host], "unshare", "--uts", "--mount", "sh", "-c", inside, name, table]

    def enter(self, host: int) -> None:
        """Move this process there, and let it know where all meet."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.spaces[host]}") as space:
            if libc.setns(space.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS):
                raise OSError(ctypes.get_errno(), "setns or unshare")
        socket.sethostname(NAMES[host])
        os.environ.update(MASTER_ADDR=ADDRESSES[0], MASTER_PORT="29500")

    def pull(self, host: int) -> None:
        """Cut this host off: what is sent arrives nowhere, and nobody is told."""
        _ip("-n", self.spaces[host], "link", "set", "eth0", "down")

    def plug(self) -> None:
        for host, space in enumerate(self.spaces):
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "address", "replace", f"{ADDRESSES[host]}/24", "dev", "eth0")

    def kill(self, host: int) -> None:
        """SIGKILL everything that runs there."""
        for pid in _ip("netns", "pids", self.spaces[host]).split():
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Raises PermissionError, with the reason, where they are not to be had."""
    if os.name != "posix" or not all(shutil.which(tool) for tool in ("ip", "unshare", "mount", "hostname")):
        raise PermissionError("there is no ip, unshare, mount or hostname here (Linux with iproute2 and util-linux has them)")
    hosts = Hosts(tuple(f"tally-{os.getpid()}-{name}" for name in NAMES), folder)
    try:
        for space in hosts.spaces:
            _ip("netns", "add", space)
        _ip("link", "add", "eth0", "netns", hosts.spaces[0], "type", "veth", "peer", "name", "eth0", "netns", hosts.spaces[1])
        hosts.plug()
        subprocess.run([*map(str, hosts.prefix(0)), "true"], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        _remove(hosts)
        raise PermissionError(f"no network namespaces here: {error.stderr.strip()}") from None
    try:
        yield hosts
    finally:
        _remove(hosts)


def _remove(hosts: Hosts) -> None:
    for space in hosts.spaces:
        subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

"""A machine with a real systemd as its first process, in namespaces of its own: processes, mounts and network."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.image_root import ImageRoot
from tests.fakes.running import wait_until

# systemd takes what a container manager prepares. https://systemd.io/CONTAINER_INTERFACE
BOOT = """
set -eu
R=$1
umount --recursive $R/proc $R/dev
mount -t proc proc $R/proc
mount -o bind,ro $R/proc/sys $R/proc/sys
mount -t sysfs -o ro sysfs $R/sys
mount -t tmpfs tmpfs $R/sys/fs/cgroup
mkdir $R/sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup $R/sys/fs/cgroup/systemd || mount -t cgroup2 cgroup2 $R/sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs $R/dev
for device in null zero full random urandom tty; do touch $R/dev/$device; mount --bind /dev/$device $R/dev/$device; done
mkdir $R/dev/shm $R/dev/pts
mount -t devpts -o newinstance,ptmxmode=0666 devpts $R/dev/pts
ln -s pts/ptmx $R/dev/ptmx
ln -s /proc/self/fd $R/dev/fd
mount -t tmpfs -o mode=0755 tmpfs $R/run
mount -t tmpfs tmpfs $R/tmp
# Nothing of this machine starts.
rm -rf $R/etc/systemd/system $R/lib/systemd/system/*.wants
mkdir $R/etc/systemd/system
# The library of the tests' Python may be in a home, which services do not see.
mkdir -p $R/etc/systemd/system.conf.d
printf '[Manager]\\nDefaultEnvironment=LD_LIBRARY_PATH=/opt/python/lib\\n' >$R/etc/systemd/system.conf.d/python.conf
printf '[Unit]\\nDefaultDependencies=no\\n' >$R/etc/systemd/system/nothing.target
ip link set lo up
# Not a chroot: no user namespace can be made in one.
cd $R
mkdir -p old
pivot_root . old
cd /
umount --lazy /old
# Credentials are mounted by a child of systemd, in a namespace that gives its mounts back.
mount --make-rshared /
exec env -i container=oci PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=nothing.target
"""
NAMESPACES = ("--mount", "--propagation", "private", "--pid", "--uts", "--ipc", "--cgroup", "--net")
COMMAND_SECONDS = 90


class NotBooted(Exception):
    """systemd does not run in a namespace here."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that runs, by the number of its first process."""

    first: int

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command there; returns what it wrote. AssertionError if it fails, unless `check` is false."""
        done = subprocess.run(self.command(words), capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs words there."""
        spaces = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net", "--root")
        return ["nsenter", f"--target={self.first}", *spaces, "--wd=/", *words]

    def path(self, inside: str) -> Path:
        """A path of the machine, as this process reaches it."""
        return Path(f"/proc/{self.first}/root{inside}")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()


@contextmanager
def booted(root: ImageRoot) -> Iterator[Machine]:
    """Boot systemd on the root file system of an image; NotBooted if it does not come up."""
    enter = ["nsenter", f"--mount=/proc/{root.holder}/ns/mnt"]
    command = [*enter, "unshare", *NAMESPACES, "--fork", "--kill-child", "sh", "-c", BOOT, "boot", root.directory]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            try:
                first = wait_until(lambda: _first_process(process))
            except TimeoutError:
                raise NotBooted("systemd does not answer") from None
            yield Machine(first)
        finally:
            process.kill()


def _first_process(process: "subprocess.Popen[bytes]") -> int | None:
    """The number of systemd, as soon as it answers."""
    if process.poll() is not None:
        assert process.stderr
        raise NotBooted(process.stderr.read().decode())
    children = subprocess.run(["pgrep", "--parent", str(process.pid)], capture_output=True, text=True, check=False)
    for child in children.stdout.split():
        machine = Machine(int(child))
        if "running" in machine.run("systemctl", "is-system-running", check=False):
            return machine.first
    return None

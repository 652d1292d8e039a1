"""The same on a real file system: ext4 on a loop device, shut down in the middle of a workload.

EXT4_IOC_SHUTDOWN stops all writes at once, those of the file system's own journal included; mounting it again recovers
it as after a power cut. Needs root and loop devices.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

from cluster.errors import StorageError
from tests.torture.children import Child, go_on_and_inspect
from tests.torture.counts import Counts
from tests.torture.oracle import Oracle
from tests.torture.workloads import WORKLOADS

EXT4_IOC_SHUTDOWN = 0x8004587D
"""_IOR('X', 125, __u32)"""
NO_LOG_FLUSH = 2
DISK_BYTES = 128 * 2**20
LONGEST_LIFE_S = 1.0


class LoopDisk:
    """An ext4 file system in a file, mounted at `mount`."""

    def __init__(self, folder: Path) -> None:
        """Make and mount it.

        Raises:
            OSError: it is not allowed here, or a tool is missing; says which.
        """
        self._image = folder / "ext4.img"
        self.mount = folder / "mount"
        self.mount.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        _run("mkfs.ext4", "-q", str(self._image))
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-t", "ext4", "-o", "loop", str(self._image), str(self.mount))

    def shut_down(self) -> None:
        """Stop every write, as a power cut does."""
        descriptor = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def power_up(self) -> None:
        """Mount it again; the kernel recovers the file system."""
        self.close()
        self._mount()

    def close(self) -> None:
        """Unmount it."""
        _run("umount", str(self.mount))


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise OSError(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def _work(connection: Connection, root: Path, name: str, seed: int) -> None:
    try:
        WORKLOADS[name](root, seed, connection.send)
    except (StorageError, OSError):
        # The disk is gone.
        return


def run(folder: Path, seed: int, num_cuts: int, counts: Counts) -> None:
    """Shut the file system down so many times.

    Raises:
        OSError: loop devices are not allowed here; nothing was done.
    """
    disk = LoopDisk(folder)
    try:
        root, oracle = disk.mount / "store", Oracle()
        for number in range(num_cuts):
            chance = random.Random(f"{seed}/{number}")
            name = list(WORKLOADS)[number % len(WORKLOADS)]
            with Child(_work, root, name, number) as child:
                child.wait_for_a_word()
                for ack in child.words(chance.uniform(0, LONGEST_LIFE_S)):
                    oracle.hear(ack)
                disk.shut_down()
                child.kill()
                for ack in child.words():
                    oracle.hear(ack)
            disk.power_up()
            counts.cuts[f"{name} on ext4"] += 1
            counts.add(oracle.inspect(root), f"seed {seed}, shutdown {number} of ext4 ({name})")
        counts.add(go_on_and_inspect(root, 1, oracle), f"seed {seed}, after all shutdowns of ext4")
        counts.acknowledged += oracle.num_heard
    finally:
        disk.close()

# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines of contrib/snapshot/host in the tests"""

import functools
import importlib
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile

from qemu_test import QemuSystemTest

from . import build_guest

ROOT = Path(__file__).resolve().parents[3]
HOST = ROOT / 'contrib' / 'snapshot' / 'host'


@functools.cache
def scratch():
    """A directory for the whole process, with a short name, for sockets"""
    return tempfile.TemporaryDirectory(prefix='snapshot-vm-')


@functools.cache
def host_programs():
    """The directory with libsnapshot-host.so, snapshot-vm and afl-snapshot"""
    path = Path(scratch().name, 'host')
    done = subprocess.run(['make', '-C', HOST, f'O={path}'], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return path


@functools.cache
def guest():
    path = Path(scratch().name, 'guest.elf')
    build_guest(path)
    return path


@functools.cache
def library():
    """The module snapshot_host"""
    os.environ['SNAPSHOT_HOST_LIBRARY'] = \
        str(host_programs() / 'libsnapshot-host.so')
    sys.path.insert(0, str(HOST))
    return importlib.import_module('snapshot_host')


class MachinesTest(QemuSystemTest):
    """All machines that a test starts end with it."""

    def setUp(self):
        super().setUp()
        self.lib = library()
        self.directory = tempfile.mkdtemp(prefix='run-', dir=scratch().name)
        os.environ['SNAPSHOT_VM_DIR'] = self.directory
        self.descriptions = set()

    def tearDown(self):
        os.environ['SNAPSHOT_VM_DIR'] = self.directory
        for path in self.descriptions:
            self.lib.stop(path)
        shutil.rmtree(self.directory)
        super().tearDown()

    def describe(self, *lines, name='vm'):
        path = Path(self.scratch_file(name))
        path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        self.descriptions.add(path)
        return path

    def describe_guest(self, *lines, options='', name='vm', machine='q35'):
        """The guest of fuzz.c"""
        return self.describe(
            f'qemu = {self.qemu_bin}', 'channel = 256K', 'console = other',
            'boot = 60', *lines, f'-machine {machine}', '-nodefaults',
            '-m 32M', '-accel tcg', '-rtc clock=vm', f'-kernel {guest()}',
            f'-append case=fuzz {options}',
            '-device isa-debugcon,iobase=0xe9,chardev=console',
            '-device pvpanic', name=name)

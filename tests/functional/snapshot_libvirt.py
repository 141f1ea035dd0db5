# SPDX-License-Identifier: GPL-2.0-or-later
"""
A daemon of libvirt's, of a user's own, with all that it writes in one
directory; as root has none, it is nobody's.
"""

import os
from pathlib import Path
import shutil
import subprocess
import time

PROGRAMS = 'libvirtd', 'virsh', 'setpriv'


class LibvirtError(Exception):
    """What virsh has said"""


def missing():
    """What to do where there is none, or None"""
    for program in PROGRAMS:
        if not shutil.which(program, path=_path()):
            return (f'there is no {program}: apt-get install libvirt-daemon '
                    'libvirt-daemon-driver-qemu libvirt-clients')
    return None


def _path():
    return f'{os.environ["PATH"]}:/usr/sbin'


class Libvirt:
    """Runs from the beginning of a "with" to its end; domains end before."""

    def __init__(self, directory, log):
        """@directory is to be empty, and anybody may get there."""
        self.directory = Path(directory)
        self.log = log
        self.env = {**os.environ, 'HOME': str(directory), 'PATH': _path()}
        for name in 'RUNTIME', 'CONFIG', 'CACHE':
            path = self.directory / name.lower()
            path.mkdir()
            self.env[f'XDG_{name}_{"DIR" if name == "RUNTIME" else "HOME"}'] \
                = str(path)
        self.user = []
        if os.getuid() == 0:
            self.user = ['setpriv', '--reuid', 'nobody', '--regid', 'nogroup',
                         '--clear-groups']
            subprocess.run(['chown', '-R', 'nobody', directory], check=True)

    def may(self, *paths):
        """May it run the first, and read all?"""
        test = ['-x', paths[0]]
        for path in paths:
            test += ['-a', '-r', path]
        return not subprocess.run([*self.user, 'test', *test],
                                  check=False).returncode

    def __enter__(self):
        with open(self.log, 'wb') as log:
            self.daemon = subprocess.Popen(
                [*self.user, 'libvirtd'], env=self.env, cwd=self.directory,
                stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.daemon.terminate()
        self.daemon.wait()

    def _wait(self):
        end = time.monotonic() + 120
        while True:
            try:
                return self.virsh('list')
            except LibvirtError as e:
                if time.monotonic() > end:
                    raise LibvirtError(f'libvirtd does not answer: {e}') from e
            time.sleep(0.1)

    def virsh(self, *args):
        """Returns: what it has printed"""
        done = subprocess.run(
            [*self.user, 'virsh', '-q', '-c', 'qemu:///session', *args],
            env=self.env, cwd=self.directory, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise LibvirtError(f'virsh {" ".join(args)}: {done.stdout.strip()}')
        return done.stdout.strip()

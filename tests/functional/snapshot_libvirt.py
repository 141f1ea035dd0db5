# SPDX-License-Identifier: GPL-2.0-or-later
"""
A daemon of libvirt's, of a user's own, with all that it writes in one
directory; as root has none, it is nobody's. It is the system's, or the one that
scripts/fetch-libvirt has made.
"""

import os
from pathlib import Path
import shutil
import subprocess
import time

PROGRAMS = 'libvirtd', 'virsh', 'setpriv'
# Debian 13's: its disk is beside it.
NEWER = Path(__file__).resolve().parents[2] / 'build' / 'libvirt' / 'root'
# What follows has /usr and /etc of another directory; all else is as it was,
# and nobody else sees a change.
WITHIN = ('unshare', '-m', 'sh', '-ec', 'for dir in usr etc; do '
          'mount --bind "$0/$dir" "/$dir"; done; exec "$@"')


class LibvirtError(Exception):
    """What virsh has said"""


def missing(root=None):
    """What to do where there is none, the system's or in @root, or None"""
    if root:
        if os.getuid():
            return f'only root can run what is in {root}'
        if not root.exists():
            return f'there is no {root}: run scripts/fetch-libvirt'
        return None
    for program in PROGRAMS:
        if not shutil.which(program, path=_path()):
            return (f'there is no {program}: apt-get install libvirt-daemon '
                    'libvirt-daemon-driver-qemu libvirt-clients')
    return None


def _path():
    return f'{os.environ["PATH"]}:/usr/sbin'


class Libvirt:
    """Runs from the beginning of a "with" to its end; domains end before."""

    def __init__(self, directory, log, root=None):
        """@directory is to be empty, and anybody may get there."""
        self.directory = Path(directory)
        self.log = log
        self.env = {**os.environ, 'HOME': str(directory), 'PATH': _path()}
        for name in 'RUNTIME', 'CONFIG', 'CACHE':
            path = self.directory / name.lower()
            path.mkdir()
            self.env[f'XDG_{name}_{"DIR" if name == "RUNTIME" else "HOME"}'] \
                = str(path)
        self.before = [*WITHIN, root] if root else []
        if os.getuid() == 0:
            self.before += ['setpriv', '--reuid', 'nobody', '--regid',
                            'nogroup', '--clear-groups']
            subprocess.run(['chown', '-R', 'nobody', directory], check=True)

    def refusal(self, program, *paths):
        """Why it cannot run @program and read all @paths, or None"""
        done = subprocess.run(
            [*self.before, 'sh', '-c',
             'exec 2>&1; "$0" --version >/dev/null && cat "$@" >/dev/null',
             program, *paths], env=self.env, text=True, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        return done.stdout.strip() if done.returncode else None

    def __enter__(self):
        with open(self.log, 'wb') as log:
            self.daemon = subprocess.Popen(
                [*self.before, 'libvirtd'], env=self.env, cwd=self.directory,
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
            [*self.before, 'virsh', '-q', '-c', 'qemu:///session', *args],
            env=self.env, cwd=self.directory, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise LibvirtError(f'virsh {" ".join(args)}: {done.stdout.strip()}')
        return done.stdout.strip()

    def sparse(self):
        """Can it save as QEMU's mapped-ram has it? Since 11.2."""
        return '--image-format' in self.virsh('help', 'save')

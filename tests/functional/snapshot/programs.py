# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the host's for the Linux guest that scripts/linux-guest packs"""

from pathlib import Path
import re
import shutil
import subprocess
import tempfile


def libraries(program):
    """The paths of those that it is linked with"""
    done = subprocess.run(['ldd', program], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL)
    return re.findall(r'(/\S+)', done.stdout) if not done.returncode else []


def pack(initramfs, files, to):
    """
    Write to @to what @initramfs has, with @files in /opt and the libraries that
    they need where they are here: the kernel unpacks archives one behind the
    other.
    """
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / 'opt').mkdir()
        for file in files:
            shutil.copy(file, root / 'opt')
            for path in libraries(file):
                copy = root / path.lstrip('/')
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        names = sorted(p.relative_to(root) for p in root.rglob('*'))
        archive = subprocess.run(
            ['cpio', '-o', '-H', 'newc', '-R', '0:0', '--quiet'], cwd=root,
            input='\n'.join(map(str, names)).encode(), check=True,
            stdout=subprocess.PIPE).stdout
    Path(to).write_bytes(Path(initramfs).read_bytes() + archive)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The bare-metal guest of the snapshot device's tests: building it"""

from pathlib import Path
import subprocess

SOURCE = Path(__file__).resolve().parent

FLAGS = ('-m32 -march=i686 -mgeneral-regs-only -std=gnu11 -O2 -ffreestanding '
         '-fno-pic -fno-stack-protector -fno-asynchronous-unwind-tables '
         '-Wall -Wextra -Wno-array-bounds -Werror '
         '-static -nostdlib -no-pie -Wl,--build-id=none -Wl,-z,noexecstack '
         ).split()


def build_guest(path, cc='gcc'):
    """
    Compile the guest, a multiboot kernel, to @path.

    It needs an x86 compiler and linker, nothing for it to run on: no libc,
    no libgcc. Raises OSError or CalledProcessError, with the compiler's
    output in stdout.
    """
    sources = sorted(SOURCE.glob('*.c')) + [SOURCE / 'start.S']
    subprocess.run([cc, *FLAGS, f'-Wl,-T,{SOURCE / "guest.ld"}',
                    f'-I{SOURCE}', f'-I{SOURCE.parents[2] / "include"}',
                    '-o', str(path), *map(str, sources)],
                   check=True, text=True,
                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kvm_copies_page_tables():
    """
    Is there no module that says that it uses two-dimensional paging? kvm_pvm
    has no such flag.
    """
    flags = ('kvm_intel/parameters/ept', 'kvm_amd/parameters/npt')
    return not any(path.exists() and path.read_text()[0] in 'Y1'
                   for path in (Path('/sys/module', flag) for flag in flags))

#!/usr/bin/env python3
#
# snapshot-seeds.py DIRECTORY
# snapshot-seeds.py --pack DIRECTORY...
#
# Inputs for generic-fuzz-snapshot-* to start from: what a guest does with the
# device, as coverage alone leads there slowly, for the fuzzer has to guess 32
# bits of a command; and what earlier runs came to, in snapshot-corpus.txt. With
# --pack, write that file.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import base64
import hashlib
from pathlib import Path
import struct
import sys

CORPUS = Path(__file__).with_name('snapshot-corpus.txt')

# As in generic_fuzz.c
READ, WRITE, CLOCK_STEP = 2, 3, 9
BYTE, WORD, LONG, QUAD = range(4)
SEPARATOR = b'FUZZ'

# As in include/hw/misc/snapshot-regs.h
COMMAND, SLOT, SLOTS, FEATURES, ARGUMENT = 0, 4, 8, 12, 0x10
RESTORES, PAGES, NANOSECONDS = 0x18, 0x20, 0x28
SAVE, RESTORE, DISCARD = 0x101, 0x102, 0x103


def write(register, value, size=LONG):
    return struct.pack('<BBBxxIQ', WRITE, size, 0, register, value)


def read(register, size=LONG):
    return struct.pack('<BBBxxI', READ, size, 0, register)


# The main loop comes to the command
STEP = struct.pack('<BQ', CLOCK_STEP, 1000000)


def command(value):
    return [write(COMMAND, value), STEP, read(COMMAND)]


SEEDS = {
    'save': command(SAVE),
    'restore': [*command(SAVE), *command(RESTORE), read(RESTORES, QUAD),
                read(PAGES, QUAD), read(NANOSECONDS, QUAD)],
    'discard': [*command(SAVE), *command(DISCARD), *command(RESTORE)],
    'slots': [write(SLOT, 1), *command(SAVE), write(SLOT, 7), *command(SAVE),
              write(SLOT, 1), *command(RESTORE), write(SLOT, 8),
              *command(SAVE), read(SLOT), read(SLOTS), read(FEATURES)],
    'argument': [write(ARGUMENT, 0x1122334455667788, QUAD), *command(SAVE),
                 write(ARGUMENT, 5, QUAD), *command(RESTORE),
                 read(ARGUMENT, QUAD), read(ARGUMENT + 4)],
    'busy': [write(COMMAND, SAVE), write(COMMAND, RESTORE),
             write(COMMAND, DISCARD), STEP, read(COMMAND)],
    'mistakes': [*command(0), *command(DISCARD + 1), write(0x30, 1),
                 read(0x30), write(COMMAND, SAVE, BYTE),
                 write(COMMAND + 1, SAVE, WORD), write(COMMAND, SAVE, QUAD)],
}


def unpack(directory):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, operations in SEEDS.items():
        (directory / name).write_bytes(SEPARATOR.join(operations))
    for line in CORPUS.read_text().splitlines():
        if not line.startswith('#'):
            data = base64.b64decode(line)
            # As libFuzzer names them
            (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)


def pack(*directories):
    inputs = {f.read_bytes() for d in directories for f in Path(d).iterdir()}
    head = [line for line in CORPUS.read_text().splitlines(True)
            if line.startswith('#')]
    CORPUS.write_text(''.join(
        head + sorted(base64.b64encode(i).decode() + '\n' for i in inputs)))
    print(f'{CORPUS}: {len(inputs)} inputs')


if __name__ == '__main__':
    if sys.argv[1] == '--pack':
        pack(*sys.argv[2:])
    else:
        unpack(sys.argv[1])

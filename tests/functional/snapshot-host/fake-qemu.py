#!/usr/bin/env python3
#
# What a host's program sees of QEMU with a snapshot device, from the protocol's
# page alone; and what no QEMU shall do
#
# SPDX-License-Identifier: GPL-2.0-or-later

import mmap
import os
import re
import signal
import socket
import struct
import sys
import time

MAGIC, VERSION = 0x50414e53, 1
HELLO, READY, RUN, RESULT, CANCEL, ENDED, ERROR = range(1, 8)
SIZE = 64


def message(kind, run=0, body=b''):
    return struct.pack('<II', kind, run) + body.ljust(SIZE - 8, b'\0')


def areas(size, offset=0):
    return struct.pack('<6QI', 0, size // 4, size // 2 + offset, size // 4,
                       size // 4 * 3, size // 4, 0)


def target(channel, size, length):
    """Counts how far the input gets into "FUZ!".  Returns: result, cause"""
    data = channel[:length]
    coverage = bytearray(size // 4)
    depth = 0
    while depth < 4 and data[depth:depth + 1] == b'FUZ!'[depth:depth + 1]:
        depth += 1
        coverage[depth * 100] = 1
    coverage[7] = 1
    channel[size // 2:size // 4 * 3] = bytes(coverage)
    if depth < 4:
        return 0, 0
    return {b'C': (1, 0), b'A': (2, 0), b'P': (1, 1), b'H': (3, 7),
            b'R': (1, 2), b'O': (1, 3), b'E': (1, 4)}.get(
                bytes(data[4:5]), (0, 0))


def serve(host, mode, channel):
    """All that is asked, until the host goes"""
    host.sendall(message(HELLO, body=struct.pack(
        '<IIQ', MAGIC + (mode == 'magic'), VERSION + (mode == 'version'),
        len(channel))))
    size = len(channel)
    if not host.recv(SIZE):
        return
    if mode == 'close':
        return
    if mode != 'mute':
        host.sendall(message(READY, body=areas(
            size, {'outside': size, 'beyond': size // 2}.get(mode, 0))))
    while request := host.recv(SIZE, socket.MSG_WAITALL):
        kind, run, length = struct.unpack_from('<IIQ', request)
        if kind != RUN or mode == 'stuck':
            continue
        if mode == 'crash':
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == 'exit':
            sys.exit(0)
        if mode == 'ended':
            # The user has reset it, and the guest is READY once more.
            mode = 'ready'
            host.sendall(message(ENDED, body=struct.pack('<I', 1)) +
                         message(READY, body=areas(size)))
        elif mode == 'type':
            host.sendall(message(99))
        else:
            result, cause = target(channel, size, length)
            if result == 3:
                # Until it is cancelled
                host.recv(SIZE, socket.MSG_WAITALL)
            host.sendall(message(RESULT, run, struct.pack(
                '<IIQQQ', result, cause, 1000 + length, 10, 0)))


def main():
    words = ' '.join(sys.argv)
    mode = re.search(r'-fake (\S+)', words)[1]
    size = int(re.search(r'size=(\d+)', words)[1])
    print('the guest says hello', flush=True)
    print('and QEMU warns', file=sys.stderr, flush=True)
    if mode == 'start':
        sys.exit(3)
    with open(re.search(r'mem-path=([^ ,]+)', words)[1], 'wb+') as f:
        f.truncate(size)
        channel = mmap.mmap(f.fileno(), size)
        f.truncate(size if mode != 'short' else size // 2)
    control = socket.socket(socket.AF_UNIX)
    control.bind(re.search(r'path=([^ ,]+/control)', words)[1])
    control.listen(1)
    while True:
        host = control.accept()[0]
        while mode == 'silent':
            time.sleep(1)
        try:
            serve(host, mode, channel)
        except OSError:
            pass
        host.close()


if __name__ == '__main__':
    main()

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
NOT_READY = 4
SIZE = 64


def message(kind, run=0, body=b''):
    return struct.pack('<II', kind, run) + body.ljust(SIZE - 8, b'\0')


class Fake:
    def __init__(self, mode, channel):
        self.mode = mode
        self.channel = channel
        self.size = len(channel)
        self.input = 0
        self.runs = 0
        self.host = None

    def send(self, kind, *args):
        data = message(kind, *args)
        if self.mode == f'part {kind}':
            # It stops in the middle of a message.
            self.host.sendall(data[:10])
            time.sleep(600)
        self.host.sendall(data)

    def send_ready(self):
        size = self.size
        offset = {'outside': size, 'beyond': size // 2}.get(self.mode, 0)
        self.send(READY, 0, struct.pack(
            '<6QI', self.input, size // 4, size // 2 + offset,
            0 if self.mode == 'none' else size // 4, size // 4 * 3, size // 4,
            0))

    def send_ended(self):
        self.send(ENDED, 0, struct.pack('<I', 1))

    def target(self, length):
        """Counts how far the input gets into "FUZ!".  Returns: result, cause"""
        data = self.channel[self.input:self.input + length]
        coverage = bytearray(self.size // 4)
        depth = 0
        while depth < 4 and data[depth:depth + 1] == b'FUZ!'[depth:depth + 1]:
            depth += 1
            coverage[depth * 100] = 1
        coverage[7] = 1
        self.runs += 1
        if self.mode == 'flaky':
            coverage[8] = self.runs & 1
        if self.mode == 'empty':
            coverage = bytearray(self.size // 4)
        if self.mode != 'none':
            self.channel[self.size // 2:self.size // 4 * 3] = bytes(coverage)
        if self.mode == 'fickle':
            return self.runs & 1, 0
        if depth < 4:
            return 0, 0
        return {b'C': (1, 0), b'A': (2, 0), b'P': (1, 1), b'H': (3, 7),
                b'R': (1, 2), b'O': (1, 3), b'E': (1, 4)}.get(
                    bytes(data[4:5]), (0, 0))

    def receive(self):
        """Returns: type, run, length of an input; or None"""
        request = self.host.recv(SIZE, socket.MSG_WAITALL)
        return struct.unpack_from('<IIQ', request) if request else None

    def hello(self):
        if self.mode == 'deaf':
            self.host.shutdown(socket.SHUT_RD)
            self.mode = 'exit deaf'
        self.send(HELLO, 0, struct.pack(
            '<IIQ', MAGIC + (self.mode == 'magic'),
            VERSION + (self.mode == 'version'), self.size))
        if self.mode == 'exit deaf':
            time.sleep(0.2)
            sys.exit(0)
        return self.receive()

    def end(self, how):
        """The guest is reset by hand, and READY again, elsewhere or never."""
        self.mode = 'ready'
        self.send_ended()
        if how == 'moved':
            self.input = self.size // 4
        if how != 'ended for ever':
            self.send_ready()

    def serve(self):
        """All that is asked, until the host goes"""
        if not self.hello() or self.mode == 'close':
            return
        if self.mode != 'mute':
            self.send_ready()
        if self.mode in ('early', 'early and short', 'early and mute'):
            self.early()
        while request := self.receive():
            if request[0] == RUN:
                self.run(*request[1:])

    def early(self):
        """It is reset and READY again before it is asked for its first run."""
        mode = self.mode
        self.end('ended')
        run = self.receive()[1]
        if mode == 'early and short':
            self.send(RESULT, run)
            run = None
        last = None
        while request := self.receive():
            kind, number, length = request
            if kind == RUN and number == last and not run:
                os.abort()
            if kind == RUN and not run:
                last = number
            if kind == CANCEL and number == run and mode == 'early':
                run = None
                self.send(RESULT, number, struct.pack('<II', 3, 7))
            elif kind == RUN and run:
                self.send(ERROR, number, struct.pack('<I', NOT_READY))
            elif kind == RUN:
                self.run(number, length)

    def run(self, run, length):
        if self.mode == 'stuck':
            return
        if self.mode == 'crash':
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.mode == 'exit':
            sys.exit(0)
        if self.mode in ('ended', 'moved', 'ended for ever'):
            self.end(self.mode)
        elif self.mode == 'type':
            self.send(99)
        elif self.mode == 'others':
            while True:
                self.send(RESULT, run + 1)
                time.sleep(0.2)
        elif self.mode == 'flood':
            while True:
                self.send(RESULT, run + 1)
        else:
            result, cause = self.target(length)
            if result == 3:
                # Until it is cancelled
                self.receive()
            if self.mode == 'one other':
                self.send(RESULT, run + 1)
            data = struct.pack('<IIQQQ', result, cause, 1000 + length, 10, 0)
            if self.mode == 'pieces':
                for byte in message(RESULT, run, data):
                    self.host.sendall(bytes([byte]))
                    time.sleep(0.02)
            else:
                self.send(RESULT, run, data)


def end_slowly(*_):
    print('it is ending', flush=True)
    time.sleep(2)
    os._exit(0)


def option(words, pattern):
    """As QEMU reads it: a comma is doubled in a value"""
    return re.search(pattern, words)[1].replace(',,', ',')


def main():
    words = ' '.join(sys.argv)
    mode = re.search(r'-fake ([^-]+)', words)[1].strip()
    size = int(re.search(r'size=(\d+)', words)[1])
    print('the guest says hello', flush=True)
    print('and QEMU warns', file=sys.stderr, flush=True)
    if mode == 'start':
        sys.exit(3)
    if mode == 'slow end':
        signal.signal(signal.SIGTERM, end_slowly)
    with open(option(words, r'mem-path=((?:[^ ,]|,,)+)'), 'ab+') as f:
        f.truncate(size)
        channel = mmap.mmap(f.fileno(), size)
        f.truncate(size if mode != 'short' else size // 2)
    control = socket.socket(socket.AF_UNIX)
    control.bind(option(words, r'path=((?:[^ ,]|,,)+/control)'))
    control.listen(1)
    if mode == 'slow start':
        time.sleep(13)
    fake = Fake(mode, channel)
    while True:
        fake.host = control.accept()[0]
        while mode == 'silent':
            time.sleep(1)
        try:
            fake.serve()
        except OSError:
            pass
        fake.host.close()


if __name__ == '__main__':
    main()

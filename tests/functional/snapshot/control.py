# SPDX-License-Identifier: GPL-2.0-or-later
"""A program on the host that asks the device for runs, for the tests"""

import mmap
import os
import socket
import struct

MAGIC = 0x50414e53
VERSION = 1

HELLO, READY, RUN, RESULT, CANCEL, ENDED, ERROR = range(1, 8)
SOCKET = 1                      # flag of HELLO
STOPPED = 1                     # flag of RUN

CAUSES = ('guest', 'panic', 'reset', 'shutdown', 'stopped', 'host time',
          'guest time', 'cancelled')
ENDS = {1: 'reset', 2: 'restored', 3: 'failed', 4: 'saved'}
REFUSALS = {1: 'type', 2: 'hello', 3: 'version', 4: 'not ready', 5: 'length',
            6: 'flags', 7: 'socket'}


def pack(kind, run, fmt='', *values):
    return struct.pack('<II' + fmt, kind, run, *values).ljust(64, b'\0')


class Closed(Exception):
    """QEMU has closed the connection"""


class Control:
    """A connection to control=, and the channel"""

    def __init__(self, path, channel, timeout=60, hello=True, fast=False):
        self.control = self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.fast = fast        # as far as the device can
        self.areas = {}
        self.id = 0
        with open(channel, 'r+b') as f:
            self.memory = mmap.mmap(f.fileno(), os.fstat(f.fileno()).st_size)
        if hello:
            self.hello()

    def close(self):
        self.control.close()
        self.socket.close()
        self.memory.close()

    def send(self, kind, fmt='', *values, run=0):
        to = self.socket if kind == RUN else self.control
        to.sendall(pack(kind, run, fmt, *values))

    def receive(self):
        """The next message: its type, the run's id, and the rest of it"""
        message = b''
        while len(message) < 64:
            more = self.socket.recv(64 - len(message))
            if not more:
                raise Closed
            message += more
        return *struct.unpack_from('<II', message), message[8:]

    def expect(self, kind):
        got, run, rest = self.receive()
        assert got == kind, (got, run, rest)
        return run, rest

    def hello(self, magic=MAGIC, version=VERSION):
        _, rest = self.expect(HELLO)
        *mine, flags = struct.unpack_from('<IIQI', rest)
        assert mine == [MAGIC, VERSION, len(self.memory)], mine
        assert flags in (0, SOCKET), flags
        if self.fast and flags:
            self.send_socket(magic, version)
        else:
            self.send(HELLO, 'II', magic, version)

    def send_file(self, fd, magic=MAGIC, version=VERSION):
        """HELLO, with a file"""
        socket.send_fds(self.control, [pack(HELLO, 0, 'II', magic, version)],
                        [fd])

    def send_socket(self, magic=MAGIC, version=VERSION, first=b''):
        """HELLO, with a socket for the rest"""
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if first:
            mine.sendall(first)
        self.send_file(other.fileno(), magic, version)
        other.close()
        mine.settimeout(self.control.gettimeout())
        self.socket = mine

    def wait_ready(self):
        _, rest = self.expect(READY)
        numbers = struct.unpack_from('<QQQQQQI', rest)
        self.areas = dict(zip(('input', 'coverage', 'text'),
                              zip(numbers[0:6:2], numbers[1:6:2])))
        return numbers[6]

    def area(self, name):
        offset, size = self.areas[name]
        return memoryview(self.memory)[offset:offset + size]

    def begin(self, data, host_ns=0, guest_ns=0, flags=0):
        self.area('input')[:len(data)] = data
        self.id += 1
        self.send(RUN, 'QQQI', len(data), host_ns, guest_ns, flags,
                  run=self.id)

    def result(self):
        """What a run has come to: its result, cause, text and times"""
        run, rest = self.expect(RESULT)
        assert run == self.id, (run, self.id)
        result, cause, host, guest, text = struct.unpack_from('<IIQQQ', rest)
        return result, CAUSES[cause], bytes(self.area('text')[:text]), \
            host, guest

    def run(self, data, **limits):
        self.begin(data, **limits)
        return self.result()[:3]

    def wait_running(self):
        """
        A run cannot begin in a run, so the answer is that one is on; or, with
        a socket, that RUN has to come from there.
        """
        self.control.sendall(pack(RUN, 0, 'Q', 1))
        assert self.refusal() == 'not ready'

    def cancel(self):
        self.send(CANCEL, run=self.id)

    def refusal(self):
        _, rest = self.expect(ERROR)
        return REFUSALS[struct.unpack_from('<I', rest)[0]]

    def end(self):
        _, rest = self.expect(ENDED)
        return ENDS[struct.unpack_from('<I', rest)[0]]

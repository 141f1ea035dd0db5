# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of QEMU's gdbstub, for tests that do not need gdb itself"""

import socket


class Gdb:
    """A connection; the machine is stopped when it is made."""

    RIP = 16

    def __init__(self, path, timeout=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.data = b''
        # Without the registers' description, RIP has another number.
        self.call('qSupported:xmlRegisters=i386')
        self.call('qXfer:features:read:target.xml:0,ffb')
        self.stopped = self.call('?')

    def byte(self):
        if not self.data:
            self.data = self.socket.recv(4096)
            if not self.data:
                raise EOFError
        first, self.data = self.data[:1], self.data[1:]
        return first

    def send(self, text):
        packet = text.encode()
        self.socket.sendall(b'$%s#%02x' % (packet, sum(packet) % 256))

    def receive(self):
        while self.byte() != b'$':
            pass
        packet = b''
        while (byte := self.byte()) != b'#':
            packet += byte
        self.byte()
        self.byte()
        self.socket.sendall(b'+')
        return packet.decode('latin-1')

    def call(self, text):
        self.send(text)
        return self.receive()

    def register(self, number):
        value = self.call(f'p{number:x}')
        return int.from_bytes(bytes.fromhex(value), 'little')

    def pc(self):
        return self.register(self.RIP)

    def memory(self, address, size):
        return bytes.fromhex(self.call(f'm{address:x},{size:x}'))

    def breakpoint(self, address, there=True):
        answer = self.call(f'{"Z" if there else "z"}0,{address:x},1')
        assert answer == 'OK', answer

    def go(self):
        """Until it stops: why"""
        return self.call('c')

    def step(self):
        return self.call('s')

    def detach(self):
        """The machine runs."""
        self.call('D')
        self.socket.close()

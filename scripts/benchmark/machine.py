# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU process: its monitor, the guest's dots, its trace events"""

import collections
import json
from pathlib import Path
import re
import socket
import subprocess
import threading
import time


class BenchError(Exception):
    """It cannot go on; the message says what to do."""


# What a restore consists of, in this order
PHASES = 'wake', 'stop', 'reset', 'ram', 'devices', 'resume'

# The phases in nanoseconds
Restore = collections.namedtuple('Restore', (*PHASES, 'pages'))

RESTORE = re.compile(r'^vm_snapshot_restore slot \d+: wake (-?\d+) ns, '
                     r'stop (-?\d+) ns, load (-?\d+) ns, start (-?\d+) ns')
LOAD = re.compile(r'^vm_snapshot_load slot \d+: (\d+) pages, RAM (-?\d+) ns, '
                  r'reset (\d), devices (-?\d+) ns')


class Machine:
    """
    Runs @qemu with @args, from the beginning of a "with" to its end.

    Channels are socket pairs, not pipes or files: nothing has to be cleaned
    up, and QEMU's end is there before QEMU is.
    """

    def __init__(self, qemu, args, directory):
        self.log = Path(directory, 'qemu.log')
        self.trace_log = Path(directory, 'trace.log')
        self.trace_log.unlink(missing_ok=True)
        self.trace_at = 0
        self.qemu, self.args = qemu, args
        self.events = []
        self.dots = []          # time, how many dots there are by then
        self.console_text = ''
        self.process = None

    def __enter__(self):
        theirs = []

        def channel(name):
            ours, other = socket.socketpair()
            theirs.append(other)
            return ours, f'socket,id={name},fd={other.fileno()}'

        self.monitor, monitor = channel('monitor')
        self.debug, debug = channel('debug')
        self.console, console = channel('console')
        self.incoming = b''
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [self.qemu, *self.args, '-D', str(self.trace_log),
             '-chardev', monitor, '-mon', 'chardev=monitor,mode=control',
             '-chardev', debug, '-device', 'isa-debugcon,chardev=debug',
             '-chardev', console],
            pass_fds=[s.fileno() for s in theirs],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=self.log.open('w'))
        for s in theirs:
            s.close()
        threading.Thread(target=self._read_dots, daemon=True).start()
        threading.Thread(target=self._read_console, daemon=True).start()
        try:
            self._next_message(30)      # the greeting
            self.qmp('qmp_capabilities')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.wait()
        for s in self.monitor, self.debug, self.console:
            s.close()

    def _read_dots(self):
        count = 0
        try:
            while data := self.debug.recv(4096):
                now = time.monotonic()
                if data.strip(b'.'):
                    self.console_text += data.decode(errors='replace')
                count += data.count(b'.')
                self.dots.append((now, count))
        except OSError:
            pass

    def _read_console(self):
        try:
            while data := self.console.recv(4096):
                self.console_text += data.decode(errors='replace')
        except OSError:
            pass

    def fail(self, what):
        """Raises BenchError, with what QEMU and the guest said"""
        time.sleep(0.1)
        said = self.log.read_text(errors='replace') + self.console_text
        end = ''.join(f'\n    {line.rstrip()}'
                      for line in said.splitlines()[-12:])
        command = ' '.join([self.qemu, *self.args])
        raise BenchError(f'{what}; QEMU was run as\n    {command}\n'
                         f'it and the guest said:{end}')

    # Monitor

    def _next_message(self, timeout):
        end = time.monotonic() + timeout
        while b'\n' not in self.incoming:
            left = end - time.monotonic()
            if left <= 0:
                return None
            self.monitor.settimeout(left)
            try:
                data = self.monitor.recv(65536)
            except socket.timeout:
                return None
            except OSError:
                data = b''
            if not data:
                self.fail('QEMU ended')
            self.incoming += data
        line, self.incoming = self.incoming.split(b'\n', 1)
        message = json.loads(line)
        if 'event' in message:
            self.events.append((time.monotonic(), message))
        return message

    def _send(self, *commands):
        """All at once, a name and a dict of arguments each"""
        try:
            self.monitor.sendall(b''.join(json.dumps(
                {'execute': command, 'arguments': arguments}).encode()
                for command, arguments in commands))
        except OSError:
            self.fail(f'QEMU ended before {commands[0][0]}')

    def _answer(self, command, timeout=120):
        while message := self._next_message(timeout):
            if 'return' in message or 'error' in message:
                return message
        self.fail(f'no answer to {command}')

    def try_qmp(self, command, timeout=120, **arguments):
        """The whole answer, be it an error"""
        self._send((command, arguments))
        return self._answer(command, timeout)

    def _returned(self, command, answer):
        if 'error' in answer:
            self.fail(f'{command}: {answer["error"]["desc"]}')
        return answer['return']

    def qmp(self, command, **arguments):
        """Underscores in names of arguments stand for hyphens."""
        arguments = {k.replace('_', '-'): v for k, v in arguments.items()}
        return self._returned(command, self.try_qmp(command, **arguments))

    def hmp(self, *lines):
        """
        Commands of the human monitor's that say nothing if all is well. QEMU
        does one after another, and need not wait for us between them.
        """
        self._send(*(('human-monitor-command', {'command-line': line})
                     for line in lines))
        for line in lines:
            said = self._returned(line, self._answer(line))
            if said.strip():
                self.fail(f'{line}: {said.strip()}')

    def wait_event(self, name, timeout=120, **data):
        """The time of the next event @name with that @data"""
        end = time.monotonic() + timeout
        seen = 0
        while True:
            for at, message in self.events[seen:]:
                if message['event'] == name and \
                        data.items() <= message.get('data', {}).items():
                    self.events = []
                    return at
            seen = len(self.events)
            if time.monotonic() > end:
                self.fail(f'no event {name}')
            self._next_message(end - time.monotonic())

    # Guest

    def wait_boot(self, text, timeout=240):
        end = time.monotonic() + timeout
        while text not in self.console_text:
            if self.process.poll() is not None:
                self.fail('QEMU ended')
            if self.qmp('query-status')['status'] == 'internal-error':
                self.fail('the machine stopped')
            if time.monotonic() > end:
                self.fail(f'the guest did not say "{text}"')
            time.sleep(0.05)

    def wait_restore(self, timeout=240):
        """Until the guest has saved itself and is put back"""
        end = time.monotonic() + timeout
        while not self.qmp('x-query-snapshot-device')['restores']:
            if time.monotonic() > end:
                self.fail('the guest does not restore')
            time.sleep(0.05)

    def type(self, line):
        self.console.sendall(line.encode() + b'\n')

    def wait_dots(self, count, timeout=240):
        end = time.monotonic() + timeout
        while not self.dots or self.dots[-1][1] < count:
            # The bare-metal guest says FAIL and halts, Linux powers off
            if self.process.poll() is not None or \
                    'FAIL' in self.console_text:
                self.fail('the guest gave up')
            if time.monotonic() > end:
                self.fail('the guest does not restore')
            time.sleep(0.005)

    # Trace events

    def trace(self, *names):
        """From here on, these events and no others; forget what there is."""
        for name in 'vm_snapshot_restore', 'vm_snapshot_load':
            self.qmp('trace-event-set-state', name=name,
                     enable=name in names)
        self.trace_at = self.trace_log.stat().st_size \
            if self.trace_log.exists() else 0

    def trace_lines(self, count, seconds):
        """Some @count lines of events, or those of so many @seconds"""
        end = time.monotonic() + seconds
        lines = []
        with self._open_trace_log() as f:
            f.seek(self.trace_at)
            part = ''
            # One at least, however long it takes
            while len(lines) < count and \
                    (time.monotonic() < end or not lines):
                time.sleep(0.01)
                if self.process.poll() is not None:
                    self.fail('QEMU ended')
                if time.monotonic() > end + 120:
                    self.fail('no trace event: was QEMU built without '
                              '--enable-trace-backends=log?')
                *whole, part = (part + f.read()).split('\n')
                lines += whole
        # The first may have begun before the event was enabled
        return lines[1:] if len(lines) > 1 else lines

    def _open_trace_log(self):
        # QEMU makes it for its first line
        while not self.trace_log.exists():
            if self.process.poll() is not None:
                self.fail('QEMU ended')
            time.sleep(0.01)
        return self.trace_log.open()


def parse_totals(lines):
    """Nanoseconds of each restore"""
    return [sum(map(int, m.groups())) for m in map(RESTORE.match, lines) if m]


def parse_restores(lines):
    """
    A Restore for each event vm_snapshot_restore. vm_snapshot_load comes before
    that, and twice where the first load found that it needs a reset.
    """
    restores, loads = [], []
    for line in lines:
        if m := LOAD.match(line):
            loads.append(tuple(map(int, m.groups())))
        elif (m := RESTORE.match(line)) and loads:
            pages, ram, reset, devices = map(sum, zip(*loads))
            wake, stop, load, start = map(int, m.groups())
            # Without a reset, the rest is what it takes to trace
            rest = max(load - ram - devices, 1) if reset else 0
            restores.append(Restore(wake, stop, rest, ram, devices, start,
                                    pages))
            loads = []
    return restores

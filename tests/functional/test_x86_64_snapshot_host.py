#!/usr/bin/env python3
#
# Functional test of the snapshot device and what a restore leaves on the host
#
# SPDX-License-Identifier: GPL-2.0-or-later

import errno
import os
from pathlib import Path
import re
import resource
import socket
import subprocess
import threading
import time

from qemu_test import QemuSystemTest

ROOT = Path(__file__).resolve().parents[2]


class Echo:
    """Sends back what comes, by TCP and UDP, on the same port of this host."""

    def __init__(self):
        # Somebody else may have that port of UDP.
        while not self.bind():
            pass
        for target in self.accept, self.answer_datagrams:
            threading.Thread(target=target, daemon=True).start()

    def bind(self):
        self.tcp = socket.create_server(('127.0.0.1', 0), backlog=64)
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self.udp.bind(('127.0.0.1', self.port))
        except OSError as e:
            self.udp.close()
            self.tcp.close()
            if e.errno != errno.EADDRINUSE:
                raise
            return False
        return True

    def accept(self):
        while True:
            try:
                peer, _ = self.tcp.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(peer,),
                             daemon=True).start()

    @staticmethod
    def answer(peer):
        with peer:
            try:
                while data := peer.recv(4096):
                    peer.sendall(data)
            except OSError:
                pass

    def answer_datagrams(self):
        while True:
            try:
                data, peer = self.udp.recvfrom(4096)
                self.udp.sendto(data, peer)
            except OSError:
                return

    def close(self):
        self.tcp.shutdown(socket.SHUT_RDWR)
        self.tcp.close()
        self.udp.close()


class LinuxGuest(QemuSystemTest):
    """A guest that scripts/linux-guest has packed"""

    PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))

    def setUp(self):
        super().setUp()
        self.serial = Path(self.log_file('serial.log'))
        self.serial.unlink(missing_ok=True)

    def boot(self, *run, device='snapshot'):
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX',
                               ROOT / 'build/linux'))
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: run scripts/linux-guest')
        self.require_device('name "snapshot"')
        self.set_machine('pc')
        self.vm.add_args('-nodefaults', '-accel', 'tcg', '-m', '256',
                         '-rtc', 'clock=vm', '-no-reboot',
                         '-serial', f'file:{self.serial}', '-device', device,
                         '-kernel', str(linux / 'vmlinuz'),
                         '-initrd', str(linux / 'initramfs'),
                         '-append', 'console=ttyS0 panic=-1 quiet '
                         'ipv6.disable=1 no_timer_check '
                         f'snapshot.run={",".join(run)}')
        self.vm.launch()

    def output(self):
        return self.serial.read_text(errors='replace')[-1500:]


class Demo(LinuxGuest):
    """contrib/snapshot/demo.c, of which scripts/demo tells the speed"""

    def test_speed(self):
        """
        Catches: a speed that depends on when the guest's output is read, or
        on a clock that goes back.
        """
        trace = self.scratch_file('trace')
        self.vm.add_args('-trace', 'vm_snapshot_discard', '-D', trace,
                         '-msg', 'timestamp=on')
        start = time.time()
        self.boot('demo', '1000')
        self.vm.wait(timeout=300 * self.PATIENCE)
        end = time.time()
        each = re.search(r'by restore 1000; (\d+) us each', self.output())
        self.assertTrue(each, self.output())
        text = Path(trace).read_text()
        marks = re.findall(r'@([\d.]+):vm_snapshot_discard slot (\d)', text)
        self.assertEqual([slot for _, slot in marks], ['1', '2', '0'], text)
        first, last, _ = (float(t) for t, _ in marks)
        self.assertLess(start, first)
        self.assertLess(last, end)
        # The first ones, which this is a mean of too, take longer.
        self.assertGreater(last - first, 1000 * (int(each[1]) - 10) / 1e6)


class UserNetwork(LinuxGuest):
    """
    A Linux guest opens connections through user networking and restores
    itself, with them open, over and over: tests/functional/snapshot-linux/net.c
    """

    def setUp(self):
        super().setUp()
        self.echo = Echo()

    def tearDown(self):
        self.echo.close()
        super().tearDown()

    def boot_net(self, restores, *targets, ram='dirty', rules=''):
        self.require_netdev('user')
        self.vm.add_args('-netdev', f'user,id=n{rules}',
                         '-device', 'virtio-net-pci,netdev=n')
        self.boot('net', str(restores), *targets,
                  device=f'snapshot,ram={ram}')

    def descriptors(self):
        return len(os.listdir(f'/proc/{self.vm.get_pid()}/fd'))

    def children(self):
        pid = self.vm.get_pid()
        return len(Path(f'/proc/{pid}/task/{pid}/children')
                   .read_text().split())

    def wait_for(self, restores, timeout=300):
        end = time.monotonic() + timeout * self.PATIENCE
        while self.vm.cmd('x-query-snapshot-device')['restores'] < restores:
            self.assertLess(time.monotonic(), end, self.output())
            time.sleep(0.05)

    def finish(self, timeout=300):
        """In how many rounds a packet seems to have been lost"""
        self.vm.wait(timeout=timeout * self.PATIENCE)
        found = re.search(r'net: restored \d+ times, at most (\d+) us, (\d+) '
                          'slow', self.output())
        self.assertTrue(found, self.output())
        self.log.info('the slowest round took %s us; %s were slow',
                      *found.groups())
        return int(found[2])

    def all_targets(self):
        port = self.echo.port
        return (f't10.0.2.2:{port}', f'u10.0.2.2:{port}', 't10.0.2.100:98',
                't10.0.2.101:99')

    def do_descriptors(self, restores, **kwargs):
        """
        Catches: a restore that leaves on the host what the guest has opened
        since the save: a descriptor, a process, a connection that is in the
        way of the next one from the same port.
        """
        self.vm.add_args('-chardev', f'socket,id=line,host=127.0.0.1,'
                         f'port={self.echo.port}')
        self.boot_net(restores, *self.all_targets(),
                      rules=',guestfwd=tcp:10.0.2.100:98-cmd:cat'
                      ',guestfwd=tcp:10.0.2.101:99-chardev:line', **kwargs)
        self.wait_for(10)
        first = self.descriptors()
        # No more than those of one round: hard to do without, if one leaks
        pid = self.vm.get_pid()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (first + 12, first + 12))
        most = children = 0
        while self.vm.is_running():
            try:
                most = max(most, self.descriptors())
                children = max(children, self.children())
            except OSError:
                break
            time.sleep(0.02)
        slow = self.finish()
        self.log.info('%d descriptors, then at most %d', first, most)
        self.assertGreater(most, 0)
        self.assertLessEqual(most, first + 12)
        # They are reaped by nobody, but there is one at a time.
        self.assertLessEqual(children, 2)
        # A busy host is slow now and then.
        self.assertLess(slow, 5 + restores / 20)

    def test_descriptors(self):
        self.do_descriptors(1500)

    def test_descriptors_remap(self):
        self.do_descriptors(60, ram='remap')

    def test_kept(self):
        """
        Catches: a connection from before the save cut by restores between
        which nothing was opened.
        """
        self.boot_net(300, f'k10.0.2.2:{self.echo.port}')
        self.finish()

    def test_kept_guest_forward(self):
        """
        Catches: of the only connections that are part of the saved state, one
        that is not put back when the others are closed.
        """
        self.vm.add_args('-chardev', f'socket,id=line,host=127.0.0.1,'
                         f'port={self.echo.port}')
        self.boot_net(300, f't10.0.2.2:{self.echo.port}', 'k10.0.2.101:99',
                      rules=',guestfwd=tcp:10.0.2.101:99-chardev:line')
        self.finish()

    def connect(self, port):
        """To the guest, if it listens: what it answers"""
        with socket.create_connection(('127.0.0.1', port), timeout=60) as s:
            try:
                s.sendall(b'hello')
                return s.recv(5, socket.MSG_WAITALL)
            except (ConnectionResetError, BrokenPipeError):
                return b''

    def forwards(self):
        """The protocol, the host's and the guest's port of each forward"""
        info = self.vm.cmd('human-monitor-command',
                           **{'command-line': 'info usernet'})
        return re.findall(r'(TCP|UDP)\[HOST_FORWARD\] .*127\.0\.0\.1 +(\d+) '
                          r'+10\.0\.2\.15 +(\d+)', info)

    def change_forward(self, command):
        reply = self.vm.cmd('human-monitor-command',
                            **{'command-line': f'hostfwd_{command}'})
        self.assertNotRegex(reply, 'invalid|not found|Could not')

    def test_host_forward(self):
        """
        Catches: a port of the host's that is closed, or another one, for a
        moment or for good, when a restore closes what was opened since; a
        forward that the user has removed, and that comes back.
        """
        restores = 500
        # The host's part is chosen by the kernel.
        self.boot_net(restores, f't10.0.2.2:{self.echo.port}', 'l0.0.0.0:4000',
                      rules=',hostfwd=tcp:127.0.0.1:0-10.0.2.15:4000'
                      ',hostfwd=udp:127.0.0.1:0-10.0.2.15:4000')
        (_, removed, _), = [f for f in self.forwards() if f[0] == 'UDP']
        self.change_forward('add n udp:127.0.0.1:0-10.0.2.15:5000')
        self.change_forward(f'remove n udp:127.0.0.1:{removed}')
        forwards = sorted(self.forwards())
        self.assertEqual([(f[0], f[2]) for f in forwards],
                         [('TCP', '4000'), ('UDP', '5000')])
        port = int(forwards[0][1])
        self.wait_for(5)
        answer = b''
        attempts = 0
        while not answer:
            self.assertEqual(sorted(self.forwards()), forwards)
            answer = self.connect(port)
            attempts += 1
        self.assertEqual(answer, b'hello')
        self.finish()
        self.log.info('%d connections', attempts)


class Monitors(QemuSystemTest):
    """Commands that come while QEMU ends, which is when a fuzzer's does"""

    ENDS = 40
    FLOODS = 4

    def connect(self, path):
        end = time.monotonic() + 60
        while True:
            s = socket.socket(socket.AF_UNIX)
            try:
                s.connect(path)
                return s
            except OSError:
                s.close()
                self.assertLess(time.monotonic(), end, f'no {path}')
                time.sleep(0.005)

    @staticmethod
    def flood(s, started):
        try:
            s.sendall(b'{"execute": "qmp_capabilities",'
                      b' "arguments": {"enable": ["oob"]}}')
            while True:
                s.sendall(b'{"execute": "query-name"}' * 64)
                started.set()
        except OSError:
            pass

    @staticmethod
    def drain(s):
        try:
            while s.recv(1 << 16):
                pass
        except OSError:
            pass

    def end_in_flood(self, n):
        """The exit status of a QEMU that is told to quit by one of many"""
        directory = self.socket_dir().name
        paths = [f'{directory}/{n}-{i}' for i in range(self.FLOODS + 1)]
        args = [self.qemu_bin, '-M', 'none', '-nodefaults', '-display', 'none']
        for path in paths:
            args += ['-qmp', f'unix:{path},server=on,wait=off']
        started = [threading.Event() for _ in range(self.FLOODS)]
        with subprocess.Popen(args) as qemu:
            sockets = [self.connect(path) for path in paths]
            threads = [threading.Thread(target=self.drain, args=(s,))
                       for s in sockets]
            threads += [threading.Thread(target=self.flood, args=pair)
                        for pair in zip(sockets, started)]
            for thread in threads:
                thread.start()
            for event in started:
                event.wait(60)
            sockets[-1].sendall(b'{"execute": "qmp_capabilities"}'
                                b'{"execute": "quit"}')
            status = qemu.wait(60)
        for s in sockets:
            s.close()
        for thread in threads:
            thread.join()
        return status

    def test_end(self):
        """
        Catches: a command that wakes the coroutine which carries out commands
        when there is none any more.
        """
        self.assertEqual([self.end_in_flood(n) for n in range(self.ENDS)],
                         [0] * self.ENDS)


if __name__ == '__main__':
    QemuSystemTest.main()

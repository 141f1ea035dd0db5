#!/usr/bin/env python3
#
# Functional test of the snapshot device's runs: inputs in, results out
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import random
import socket
import subprocess
import time

from qemu_test import QemuSystemTest
from snapshot import control
from snapshot.storm import Machine

MS = 1000 * 1000

# Not send-key, which has a key released, and later ones pressed, when some of
# the guest's time has gone by: that may be in a run.
KEY = [{'type': 'key', 'data': {
    'down': True, 'key': {'type': 'qcode', 'data': 'a'}}}]


class Runs(Machine):
    """What the tests share: a guest whose input says what it does"""

    FAST = False
    ACCEL = 'tcg'

    def start_runs(self, *args, device='', machine='pc', size='128K',
                   **options):
        self.path = self.socket_dir().name + '/control'
        self.channel = self.scratch_file('channel')
        self.start(f'snapshot,control=control,channel=channel{device}',
                   '-object', 'memory-backend-file,id=channel,share=on,'
                   f'size={size},mem-path={self.channel}',
                   '-chardev', f'socket,id=control,path={self.path},'
                   'server=on,wait=off', '-device', 'pvpanic', *args,
                   machine=machine, accel=self.ACCEL, case='run', **options)
        self.host = self.attach()

    def attach(self, **options):
        host = control.Control(self.path, self.channel, fast=self.FAST,
                               timeout=self.DEADLINE, **options)
        self.addCleanup(host.close)
        if options.get('hello', True):
            self.assertEqual(host.wait_ready(), 0)
        return host

    def assert_quiet(self, seconds):
        self.host.socket.settimeout(seconds)
        self.assertRaises(TimeoutError, self.host.receive)
        self.host.socket.settimeout(self.DEADLINE)

    def assert_run(self, data=b'e', expected=(0, 'guest'), text=None):
        """Each run sees the machine as it was at READY."""
        result = self.host.run(data)
        self.assertEqual(result[:2], expected, data)
        self.assertEqual(result[2], data if text is None else text)
        coverage = self.host.area('coverage')
        self.assertEqual(coverage[0], 1, 'a run saw what another one did')
        for byte in set(data):
            self.assertEqual(coverage[0x100 + byte],
                             data.count(bytes((byte,))) % 256)
        self.assertEqual(sum(coverage[0x100:0x200]), len(data))

    def assert_closed(self, host, reason=None):
        if reason:
            self.assertEqual(host.refusal(), reason)
        self.assertRaises(control.Closed, host.receive)
        host.close()

    def begin_and_hang(self):
        """The guest has read its STATUS, which the user can change."""
        before = self.console.read_text().count('hangs')
        self.host.begin(b'y')
        self.wait_said('hangs', before)

    def wait_said(self, word, before=0):
        for _ in range(100 * self.DEADLINE):
            if self.console.read_text().count(word) > before:
                return
            time.sleep(0.01)
        self.fail(f'the guest does not say {word}')

    def wait_event(self, name):
        event = self.vm.event_wait(name, timeout=self.DEADLINE)
        self.assertIsNotNone(event, name)


class Run(Runs):
    """All that goes through the control socket"""

    def test_data(self):
        """
        Inputs of all lengths, as they were sent, and none is seen by the next
        run. Catches one that is copied short or to another place, and a
        restore that leaves something of a run.
        """
        for machine, device in (('pc', ',ram=dirty'), ('q35', ',ram=remap')):
            self.start_runs(machine=machine, device=device + ',verify=on')
            size = len(self.host.area('input'))
            self.assertEqual(size, 0x3000)
            for length in (1, 2, 4094, 4095, 4096, 4097, size, 1):
                data = (b'e' + bytes(i % 251 + 1 for i in range(size)))[:length]
                result = self.host.run(data)
                self.assertEqual(result[:2], (0, 'guest'), length)
                self.assertEqual(result[2], data[:0x1000], length)
            for _ in range(100):
                self.assert_run(b'easily')
            self.assert_run(b'', text=b'')
            info = self.query()
            self.assertEqual(info['mismatched'], 0, info['mismatches'])
            self.assertGreaterEqual(info['verified'], 100)

    def test_results(self):
        """
        What the guest says of a run, and what happens to it. Catches an end
        that is taken for another one, or ends more than the run.
        """
        for args in (), ('-no-reboot', '-no-shutdown'), \
                ('-action', 'panic=pause,reboot=shutdown,shutdown=pause'):
            self.start_runs(*args)
            for data, expected in ((b'c', (1, 'guest')), (b's', (2, 'guest')),
                                   (b'S', (4, 'guest')), (b'x', (5, 'guest')),
                                   (b'?', (5, 'guest')), (b't', (1, 'reset')),
                                   (b'p', (1, 'panic')), (b'k', (1, 'reset')),
                                   (b'9', (1, 'reset')),
                                   (b'q', (1, 'shutdown')),
                                   (b'o', (1, 'shutdown'))):
                self.assert_run(data + b'-text', expected)
                self.assert_run()
            self.assert_state('running')

    def test_refused(self):
        """
        Catches what is noticed too late: when QEMU writes to memory that is
        read-only, or waits for a host that never hears of it.
        """
        memory = self.scratch_file('memory')
        with open(memory, 'wb') as f:
            f.truncate(128 * 1024)
        file = f'memory-backend-file,id=c,size=128K,mem-path={memory}'
        memfd = 'memory-backend-memfd,id=c,share=on,size='
        for backend, properties, error in (
                (memfd + '128K', 'control=n', 'needs channel='),
                (memfd + '128K', 'control=m,channel=c', 'without mux=on'),
                (memfd + '32K', 'control=n,channel=c', 'is smaller than'),
                (memfd + '96K', 'channel=c', 'not a power of 2'),
                (file, 'control=n,channel=c', 'use share=on'),
                (file + ',share=on,readonly=on', 'control=n,channel=c',
                 'is read-only'),
                (memfd + '128K', 'keep=c:d', "'d' is not the id")):
            done = subprocess.run(
                [self.qemu_bin, '-nodefaults', '-display', 'none', '-object',
                 backend, '-chardev', 'null,id=n', '-chardev',
                 'null,id=m,mux=on', '-device', f'snapshot,{properties}'],
                stderr=subprocess.PIPE, text=True, check=False, timeout=60)
            self.assertEqual(done.returncode, 1, properties)
            self.assertIn(error, done.stderr)

    def test_limits(self):
        """
        A guest that takes too long, with interrupts off or halted, is put back.
        Catches a limit that does not end it, or ends the run after it.
        """
        for args in (), ('-icount', 'shift=3,sleep=off'):
            self.start_runs(*args)
            for data in b'h', b'H':
                for limits, cause in (({'host_ns': 50 * MS}, 'host time'),
                                      ({'guest_ns': 50 * MS}, 'guest time')):
                    self.host.begin(data, **limits)
                    result, why, text, host, guest = self.host.result()
                    self.assertEqual((result, why, text), (3, cause, data))
                    self.assertGreaterEqual(host if 'host_ns' in limits
                                            else guest, 50 * MS)
                    self.assert_run()
            # One that expires behind the run's end is of no run.
            self.assertEqual(self.host.run(b'e', host_ns=5000 * MS)[0], 0)
            self.assertEqual(self.host.run(b'e', guest_ns=50 * MS)[0], 0)
            self.assertEqual(self.host.run(bytes((ord('w'), 100)))[0], 0)
            self.assertEqual(self.host.run(b'h', host_ns=20 * MS)[0], 3)

    def test_limits_of_saves(self):
        """
        Catches a guest that puts its limits off by saving again and again.
        """
        self.start_runs()
        for limits, cause in (({'host_ns': 200 * MS}, 'host time'),
                              ({'guest_ns': 20 * MS}, 'guest time')):
            self.host.begin(b'L', **limits)
            self.assertEqual(self.host.result()[:2], (3, cause))
            self.assert_run()

    def test_earlier_slot(self):
        """
        A guest that goes back to before READY in a run. Catches a time of less
        than nothing, which is taken for five centuries.
        """
        self.start_runs(options='early=1')
        self.host.begin(b'E')
        self.assertEqual(self.host.result()[0::4], (0, 0))
        self.assert_run()

    def test_sleep(self):
        """
        A guest that sleeps in a run. Catches one that goes to sleep when its
        run is over, as another vCPU has asked for just before, and a run that
        is taken for the guest's end when it wakes up.
        """
        for machine in 'pc', 'q35':
            self.start_runs(machine=machine, cpus=2)
            for delay in range(100):
                # Either is first, and a run that sleeps does not end itself.
                self.host.begin(bytes((ord('3'), delay)), host_ns=50 * MS)
                self.assertIn(self.host.result()[1], ('guest', 'host time'))
                self.host.begin(b'e', host_ns=1000 * MS * self.PATIENCE)
                self.assertEqual(self.host.result()[1], 'guest')
                self.assert_state('running')
            self.vm.get_qmp_events()
            self.host.begin(b'z')
            self.wait_event('SUSPEND')
            self.vm.cmd('system_wakeup')
            self.wait_event('WAKEUP')
            self.host.cancel()
            self.assertEqual(self.host.result()[1], 'cancelled')
            self.assert_run()
            self.host.begin(b'z', host_ns=200 * MS)
            self.assertEqual(self.host.result()[1], 'host time')
            self.assert_run()
            self.assert_state('running')

    def test_watchdog(self):
        """
        Catches an action= that ends QEMU, or the guest with the run.
        """
        for action, cause in (('reset', 'reset'), ('poweroff', 'shutdown'),
                              ('pause', 'stopped'), ('none', 'host time'),
                              ('debug', 'host time')):
            self.start_runs('-device', 'ib700', '-action',
                            f'watchdog={action}')
            for _ in range(3):
                self.host.begin(b'W', host_ns=1000 * MS)
                self.assertEqual(self.host.result()[1], cause, action)
                self.assert_run()
            self.assert_state('running')

    def test_disk_error(self):
        """
        An error of a disk stops QEMU in a run, or when DONE waits for the
        request that fails. Catches a machine that stays stopped.
        """
        image = self.scratch_file('image')
        with open(image, 'wb') as f:
            f.truncate(1024 * 1024)
        for data, cause in (b'Dh', 'stopped'), (b'D', 'guest'):
            self.start_runs(
                '-object', 'throttle-group,id=slow,x-iops-total=1',
                '-blockdev', 'driver=blkdebug,node-name=bad,image.driver=file,'
                f'image.filename={image},inject-error.0.event=none,'
                'inject-error.0.iotype=write,inject-error.0.errno=28,'
                'inject-error.0.sector=8',
                '-blockdev', 'driver=throttle,node-name=disk,file=bad,'
                'throttle-group=slow',
                '-device', 'ide-hd,bus=ide.0,unit=0,drive=disk,werror=stop',
                device=',disks=keep')
            for _ in range(2):
                self.host.begin(data)
                self.assertEqual(self.host.result()[1], cause, data)
                self.assert_run()
                self.assert_state('running')

    def test_not_put_back(self):
        """
        A device that is plugged in a run. Catches a guest that has asked for
        its end, and goes on instead.
        """
        for data, cause, action in ((b'dp', 'panic', 'panic=pause'),
                                    (b'd9', 'reset', 'reboot=reset'),
                                    (b'do', 'shutdown', 'shutdown=pause'),
                                    (b'dc', 'guest', 'shutdown=pause')):
            self.start_runs('-action', action)
            self.host.begin(data)
            self.wait_said('delays')
            self.vm.cmd('device_add', driver='virtio-rng-pci', id='rng')
            self.assertEqual(self.host.result()[1], cause)
            self.assertEqual(self.host.end(), 'failed')
            if cause == 'reset':
                self.host.wait_ready()
                self.assert_run()
            elif cause == 'panic':
                self.wait_event('GUEST_PANICKED')
                self.assert_state('guest-panicked')
            elif cause == 'shutdown':
                self.wait_event('SHUTDOWN')
                self.assert_state('shutdown')
            else:
                self.wait_said('DONE has failed')

    def test_large_channel(self):
        """
        INPUT_LENGTH has 32 bits. Catches a length that is more, and is cut.
        """
        self.start_runs(size='8G')
        for length in (1 << 32) + 1, (1 << 32), (1 << 64) - 1:
            self.host.send(control.RUN, 'Q', length)
            self.assertEqual(self.host.refusal(), 'length')
        self.assert_run()

    def test_cancel(self):
        """
        Catches a CANCEL that does not end its run, or ends another one.
        """
        self.start_runs()
        for _ in range(20):
            self.host.begin(b'h')
            self.host.cancel()
            self.assertEqual(self.host.result()[:2], (3, 'cancelled'))
            self.host.cancel()
            self.assert_run()
        self.host.begin(b'h')
        self.host.send(control.CANCEL, run=self.host.id + 1)
        self.host.wait_running()
        self.host.cancel()
        self.assertEqual(self.host.result()[1], 'cancelled')

    def test_hostile_guest(self):
        """
        What the guest does to its registers, memory and slots in a run. Catches
        one that makes QEMU read, write or end what it must not.
        """
        for ram in 'dirty', 'remap':
            self.start_runs(device=f',ram={ram}')
            self.assert_run(b'l')
            self.assert_run(b'R')
            self.assert_run(b'r')
            self.assertEqual(self.host.area('coverage')[1], 1)
            self.assertEqual(self.host.run(b'b')[:2], (0, 'guest'))
            self.assertFalse(any(self.host.area('coverage')))
            self.assert_run()
            self.host.begin(b'v')
            self.assertEqual(self.host.end(), 'saved')

    def test_protocol(self):
        """
        Catches a message that is taken though it is wrong, and one that ends
        more than the connection.
        """
        self.start_runs()
        self.host.send(control.RUN, 'Q', 0x3001)
        self.assertEqual(self.host.refusal(), 'length')
        self.host.send(control.RUN, 'QQQI', 1, 0, 0, 2)
        self.assertEqual(self.host.refusal(), 'flags')
        self.assert_run()
        for kind in control.RESULT, control.HELLO, 0, 0xffffffff:
            self.host.send(kind)
            self.assertEqual(self.host.refusal(), 'type')
            self.assertRaises(control.Closed, self.host.receive)
            self.host.close()
            self.host = self.attach()
            self.assert_run()
        self.host.close()
        for magic, version, reason in ((1, 1, 'hello'),
                                       (control.MAGIC, 2, 'version')):
            host = self.attach(hello=False)
            host.fast = False
            host.hello(magic, version)
            self.assertEqual(host.refusal(), reason)
            self.assertRaises(control.Closed, host.receive)
            host.close()
        host = self.attach(hello=False)
        host.expect(control.HELLO)
        host.send(control.RUN, 'Q', 1)
        self.assertEqual(host.refusal(), 'hello')
        host.close()
        # A part of a message is none.
        host = self.attach(hello=False)
        host.socket.sendall(b'\1\0\0')
        host.close()
        self.host = self.attach()
        self.assert_run()

    def test_hosts(self):
        """
        Hosts that go in the middle of a run, and two at once. Catches a guest
        that runs on, or a result that comes to the wrong host.
        """
        self.start_runs()
        for flags in 0, control.STOPPED:
            for _ in range(5):
                self.host.begin(b'h', flags=flags)
                if flags:
                    self.wait_event('STOP')
                self.host.close()
                self.host = self.attach()
                self.assert_run()
        first, self.host = self.host, self.attach(hello=False)
        self.assert_quiet(0.2)
        second, self.host = self.host, first
        self.assert_run()
        first.close()
        self.host = second
        second.hello()
        second.wait_ready()
        self.assert_run()

    def test_user(self):
        """
        What the user does while the guest waits, and while it runs. Catches a
        guest that runs when it should wait, or waits for ever.
        """
        self.start_runs()
        vm = self.vm
        for _ in range(3):
            vm.cmd('stop')
            vm.cmd('cont')
            self.assert_exact(0)
        self.assert_run()
        # A stopped machine runs when it is continued; that time is not counted.
        vm.cmd('stop')
        self.host.begin(b'e', host_ns=200 * MS * self.PATIENCE)
        self.assert_quiet(0.5)
        vm.cmd('cont')
        self.assertEqual(self.host.result()[:2], (0, 'guest'))
        for end, cause in (lambda: vm.cmd('cont'), 'guest'), \
                (self.host.cancel, 'cancelled'):
            vm.get_qmp_events()
            self.host.begin(b'e', flags=control.STOPPED)
            self.wait_event('STOP')
            self.assert_state('paused')
            end()
            self.assertEqual(self.host.result()[1], cause)
            self.assert_run()
            self.assert_state('running')
        # Another slot may be saved, and verified, and the guest still waits.
        self.assertIsNone(self.command('save', 1))
        self.assert_exact(0)
        self.assert_exact(1)
        self.assert_run()
        for act, why in ((lambda: self.command('restore', 0), 'restored'),
                         (lambda: self.command('restore', 1), 'restored'),
                         (lambda: self.command('save', 0), 'saved'),
                         (lambda: self.command('discard', 0), 'saved'),
                         (lambda: vm.cmd('system_reset'), 'reset')):
            for hangs in False, True:
                if hangs:
                    self.begin_and_hang()
                act()
                self.assertEqual(self.host.end(), why)
                if why == 'saved' and hangs:
                    # It hangs, and nobody would put it back.
                    vm.cmd('system_reset')
                self.host.wait_ready()
                self.assert_run()
        reply = vm.qmp('migrate', uri='exec:cat>/dev/null')
        self.assertIn('waits for runs', reply['error']['desc'])

    def test_from_outside(self):
        """
        Keys that come while the guest waits, and while it runs. Catches a run
        that begins in another machine than that of READY.
        """
        for machine, device in (('pc', ',ram=dirty'), ('q35', ',ram=remap')):
            self.start_runs(machine=machine, device=device + ',verify=on')
            for _ in range(10):
                self.vm.cmd('input-send-event', events=KEY)
                self.assert_run()
                self.assertEqual(self.host.area('coverage')[8], 0)
            self.begin_and_hang()
            self.vm.cmd('input-send-event', events=KEY)
            self.host.cancel()
            self.assertEqual(self.host.result()[1], 'cancelled')
            self.assert_run()
            self.assertEqual(self.host.area('coverage')[8], 0)
            self.assertEqual(self.query()['mismatched'], 0)

    def test_begin(self):
        """
        The machine that a run begins in is that of READY, where it is put back
        in place, where a device has to be reset for that, and where all is. A
        timer of it expires at once. Catches a run that begins behind what
        came after the restore that was made for it.
        """
        for machine, device, args in (
                ('pc', ',ram=dirty', ()),
                ('pc', ',ram=dirty',
                 ('-device', 'piix3-usb-uhci', '-device', 'usb-kbd')),
                ('pc', ',ram=dirty,new-generation=on', ()),
                ('q35', ',ram=remap', ())):
            self.log.info('%s%s %s', machine, device, args)
            self.start_runs(*args, machine=machine, device=device,
                            options='timer=1')
            for _ in range(5):
                self.vm.cmd('input-send-event', events=KEY)
                self.vm.get_qmp_events()
                # Nothing is executed, and no input is copied.
                self.host.begin(b'', flags=control.STOPPED)
                self.wait_event('STOP')
                self.assert_exact(0)
                self.host.cancel()
                self.assertEqual(self.host.result()[1], 'cancelled')

    def test_processors(self):
        """Two vCPUs stop and go back together."""
        self.start_runs(cpus=2)
        for _ in range(50):
            self.assert_run()
        self.assertEqual(self.host.run(b'h', host_ns=20 * MS)[0], 3)
        self.assert_run()

    def test_clock(self):
        """
        The guest's clock stands while it waits, and that of the result is the
        guest's. Catches a run that begins later than READY.
        """
        for args in (), ('-icount', 'shift=3'):
            self.start_runs(*args)
            for act in (lambda: None, lambda: self.vm.cmd('stop'),
                        lambda: self.vm.cmd('cont'),
                        lambda: self.command('save', 1)):
                act()
                self.assert_quiet(1)
                if self.vm.cmd('query-status')['running']:
                    self.assert_run()
                    pm_timer = self.host.area('coverage')[4:8].cast('I')[0]
                    self.assertLess(pm_timer / 3579545, 0.5)
            self.host.begin(bytes((ord('w'), 50)))
            self.assertGreater(self.host.result()[4], 50 * MS)


class FastRun(Run):
    """The same, with a socket on which a vCPU waits"""

    FAST = True

    def test_socket(self):
        """
        Catches a file that is taken for a socket, a message of another size,
        a RUN that a host has sent before it knew of READY, and a vCPU that
        waits for a host that has gone.
        """
        self.start_runs()
        self.assert_run()
        if self.host.socket is self.host.control:
            self.skipTest('no ram=dirty here, and so no socket')
        self.host.close()
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with open(self.channel, 'rb') as file, pair[0], pair[1]:
            for fd in file.fileno(), pair[0].fileno():
                host = self.attach(hello=False)
                host.expect(control.HELLO)
                host.send_file(fd)
                self.assert_closed(host, 'socket')
        run = control.pack(control.RUN, 7, 'Q', 1)
        for message in run[:-1], run + b'x', b'x', \
                control.pack(control.CANCEL, 0):
            host = self.attach()
            host.socket.sendall(message)
            self.assert_closed(host, 'type')
        host = self.attach(hello=False)
        host.expect(control.HELLO)
        host.send_socket(first=run)
        self.assertEqual(host.refusal(), 'not ready')
        host.wait_ready()
        host.socket.close()
        host.socket = host.control
        self.assert_closed(host)
        self.host = self.attach()
        self.assert_run()
        self.host.control.sendall(run)
        self.assertEqual(self.host.refusal(), 'not ready')
        self.assert_run()
        self.assert_state('running')

    def test_storm(self):
        """
        A host and a user that do anything at any time. Catches a run that
        begins while QEMU waits for the vCPUs to stop, and whatever else comes
        together only now and then.
        """
        seconds = float(os.getenv('QEMU_TEST_SNAPSHOT_STORM', '4'))
        for machine, ram, args, cpus in (
                ('pc', 'dirty', (), 1), ('q35', 'remap', (), 1),
                ('pc', 'dirty', ('-icount', 'shift=3,sleep=off'), 1),
                ('q35', 'dirty', (), 2)):
            seed = time.time_ns()
            self.log.info('%s %s, seed %u', machine, ram, seed)
            choice = random.Random(seed)
            self.start_runs(*args, machine=machine, cpus=cpus,
                            device=f',ram={ram},verify=7')
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                self.do_anything(choice)
            info = self.query()
            self.assertEqual(info['mismatched'], 0, info['mismatches'])
            self.assert_run()
            self.assert_state('running')

    def do_anything(self, choice):
        act = choice.choice(['run'] * 10 + ['cancel'] * 4 + [
            'limit', 'stopped', 'close', 'socket', 'key', 'stop', 'cont',
            'verify', 'mce'])
        wait = choice.random() * 0.003 * (choice.random() < 0.5)
        if act == 'run':
            self.assert_run(b'e' + b'xyz'[:choice.randrange(4)])
        elif act in ('cancel', 'stopped'):
            self.host.begin(choice.choice((b'h', b'e')),
                            flags=control.STOPPED * (act == 'stopped'))
            time.sleep(wait)
            self.host.cancel()
            self.assertIn(self.host.result()[1], ('cancelled', 'guest'))
        elif act == 'limit':
            self.host.begin(b'h', host_ns=choice.randrange(1, 5 * MS))
            self.assertEqual(self.host.result()[1], 'host time')
        elif act in ('close', 'socket'):
            if wait:
                self.host.begin(choice.choice((b'h', b'e', b't')))
                time.sleep(wait)
            if act == 'socket':
                self.host.socket.close()
            self.host.close()
            self.host = self.attach()
        elif act == 'key':
            self.vm.cmd('send-key', keys=[{'type': 'qcode', 'data': 'a'}])
        elif act == 'stop':
            self.vm.cmd('stop')
            time.sleep(wait)
            self.vm.cmd('cont')
        elif act == 'cont':
            self.vm.cmd('cont')
        elif act == 'verify':
            self.vm.cmd('x-snapshot-device-verify', slot=0)
        elif act == 'mce':
            self.vm.cmd('human-monitor-command',
                        command_line='mce 0 1 0x8000000000000000 0 0 0')

    def test_monitor(self):
        """
        The user asks for what only the vCPU's thread can tell, as it waits.
        Catches one that does not hear of it.
        """
        for args in (), ('-icount', 'shift=3'):
            if args and self.ACCEL != 'tcg':
                continue
            self.start_runs(*args)
            for _ in range(200):
                self.assert_run()
                for command in ('info registers',
                                'mce 0 1 0x8000000000000000 0 0 0'):
                    self.vm.cmd('human-monitor-command',
                                command_line=command)


class KvmRun(Runs):
    """What is another thing with KVM: the wait of its only vCPU"""

    FAST = True
    ACCEL = 'kvm'

    test_cancel = Run.test_cancel
    test_hosts = Run.test_hosts
    test_socket = FastRun.test_socket
    test_monitor = FastRun.test_monitor


del Machine


if __name__ == '__main__':
    QemuSystemTest.main()

#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/host, the library through which a program
# on the host has a guest of the snapshot device run inputs
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import random
import signal
import subprocess
import time

from snapshot.hosts import HostTest, monitor
from snapshot.machines import MachinesTest, guest, host_programs

HERE = Path(__file__).resolve().parent


class Guest(HostTest):
    """A guest that processes what snapshot/fuzz-target.h does"""

    MAP = 65536
    LETTERS = b'CAHWPTROSI'

    def expected_map(self, data):
        """As EDGE() counts in snapshot/fuzz-target.h and fuzz.c"""
        edges = [0x101]
        for byte, edge in zip(b'FUZ!', (0x213, 0x345, 0x467, 0x589)):
            if len(data) < len(edges) or data[len(edges) - 1] != byte:
                break
            edges.append(edge)
        if len(edges) == 5 and data[4:] and data[4] in self.LETTERS:
            edges.append(0x800 + 2 * data[4])
        if len(edges) == 1 and len(data) > 1 and data[0] & 1:
            edges.append(0x6ab)
        counts, previous = {}, 0
        for edge in edges:
            i = (edge ^ previous) % self.MAP
            counts[i] = counts.get(i, 0) + 1
            previous = edge >> 1
        return counts

    def check_run(self, vm, data, result=None, cause=None, text='',
                  limits=None):
        run = vm.run(data, limits)
        self.assertEqual(run.result, self.lib.OK if result is None else result,
                         (data[:8], run.text))
        self.assertEqual(run.cause, cause or self.lib.GUEST)
        self.assertEqual(run.text, text)
        self.assertEqual(len(run.coverage), self.MAP)
        self.assertEqual({i: n for i, n in enumerate(run.coverage) if n},
                         self.expected_map(data), data[:8])
        return run



class Bare(Guest):
    """The bare-metal guest of snapshot/fuzz.c"""

    def ends(self):
        """Each way in which a run can end: letter, result, cause, text"""
        lib = self.lib
        return ((b'C', lib.CRASH, lib.GUEST, 'the planted crash'),
                (b'A', lib.SANITIZER, lib.GUEST, 'ERROR: a planted report'),
                (b'P', lib.CRASH, lib.PANIC, ''),
                (b'T', lib.CRASH, lib.RESET, ''),
                (b'R', lib.CRASH, lib.RESET, ''),
                (b'O', lib.CRASH, lib.SHUTDOWN, ''),
                (b'H', lib.HANG, lib.HOST_TIME, ''),
                (b'W', lib.HANG, lib.HOST_TIME, ''),
                (b'S', lib.STOP, lib.GUEST, 'the guest has seen enough'),
                (b'I', lib.INVALID, lib.GUEST, 'not possible here'))

    def check_results(self, machine, *lines):
        """
        Catches an end that is taken for another, is not undone, or whose
        coverage is not that of its run.
        """
        path = self.describe_guest('timeout = 300', *lines, machine=machine)
        with self.lib.Machine(path) as vm:
            self.check_run(vm, b'')
            for letter, *end in self.ends():
                self.check_run(vm, b'FUZ!' + letter, *end)
                self.check_run(vm, b'FUZ?' + letter)
            qemu = self.qemu(path)
        # The machine that all this has happened to is as good as new.
        with self.lib.Machine(path, flags=self.lib.ATTACH) as vm:
            self.assertEqual(self.qemu(path), qemu)
            self.check_run(vm, b'FUZ!x')

    def test_results_pc(self):
        self.check_results('pc', 'device = ram=dirty')

    def test_results_q35(self):
        self.check_results('q35', 'device = ram=remap')

    def test_no_reboot(self):
        """What the user wants to happen with a panic must not happen here."""
        self.check_results('q35', '-no-reboot', '-no-shutdown',
                           '-action panic=exit-failure')

    def test_random(self):
        """Catches an input, or a map, that is another run's."""
        rng = random.Random(1)
        with self.lib.Machine(self.describe_guest()) as vm:
            for _ in range(3000):
                data = b'FUZ!'[:rng.randrange(5)] + \
                    rng.randbytes(rng.choice((0, 1, 2, 100, 5000)))
                if data[:4] == b'FUZ!' and data[4:] and data[4] in self.LETTERS:
                    continue
                self.check_run(vm, data)

    def test_lengths(self):
        path = self.describe_guest(options='size=1000')
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.input_size, 1000)
            self.check_run(vm, bytes(1000))
            self.assert_fails(self.lib.E_LENGTH, '1001 bytes.*1000', vm.run,
                              bytes(1001))
            self.check_run(vm, b'FU')

    def test_limits(self):
        """Catches a limit of the wrong clock, and a cancel that is lost."""
        lib = self.lib
        path = self.describe_guest('timeout = 0', 'guest-timeout = 50')
        with lib.Machine(path) as vm:
            run = self.check_run(vm, b'FUZ!H', lib.HANG, lib.GUEST_TIME)
            self.assertGreaterEqual(run.guest_ns, 50e6)
            run = self.check_run(vm, b'FUZ!H', lib.HANG, lib.HOST_TIME,
                                 limits=lib.Limits(host_ns=70000000))
            self.assertGreaterEqual(run.host_ns, 70e6)
            self.assertLess(run.host_ns, 5e9)
            for wait in (0, 0, 0.001, 0.2):
                vm.begin(b'FUZ!H', lib.Limits())
                time.sleep(wait)
                vm.cancel()
                run = vm.end()
                self.assertEqual((run.result, run.cause),
                                 (lib.HANG, lib.CANCELLED))
                # One that comes too late has no effect.
                vm.cancel()
                self.check_run(vm, b'FUZ')

    def test_host_killed(self):
        """Catches a run that goes on for ever, with its host gone."""
        path = self.describe_guest('timeout = 0')
        with self.lib.Machine(path):
            qemu = self.qemu(path)
        for data in (None, b'', b'FUZ!H', b'FUZ!W'):
            self.kill_holder(path, data)
            with self.lib.Machine(path, flags=self.lib.ATTACH) as vm:
                self.check_run(vm, b'FUZ!x')
                self.assertEqual(self.qemu(path), qemu)

    def test_qemu_killed(self):
        path = self.describe_guest()
        with self.lib.Machine(path) as vm:
            vm.begin(b'FUZ!H', self.lib.Limits())
            os.kill(self.qemu(path), signal.SIGKILL)
            self.assert_fails(self.lib.E_DIED, 'signal 9', vm.end)
            vm.restart()
            self.check_run(vm, b'FUZ!x')

    def test_reset(self):
        """
        The user resets the machine, which gets READY again. Catches a run that
        goes on with nobody who waits for it, and keeps the next from the guest.
        """
        path = self.describe_guest('timeout = 0', 'boot = 20')
        with self.lib.Machine(path) as vm:
            self.check_run(vm, b'')
            # It may be READY again before the next run is asked for.
            for wait in 0, 2, 0:
                with monitor(vm.directory) as qmp:
                    qmp.cmd('system_reset')
                time.sleep(wait)
                self.assert_fails(self.lib.E_ENDED, 'reset', vm.run, b'FUZ!H')
                self.check_run(vm, b'FUZ!x')

    def test_coverage_tcg(self):
        """Catches a map of QEMU's that is another run's, or the guest's."""
        path = self.describe_guest('coverage = tcg,mode=kernel', 'map = 16K')
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.coverage_size, 16384)
            maps = {}
            for data in (b'', b'FU', b'FUZ!C', b'FUZ!H', b'FUZ!') * 5:
                run = vm.run(data, self.lib.Limits(guest_ns=20000000))
                self.assertEqual(len(run.coverage), 16384)
                seen = {i for i, n in enumerate(run.coverage) if n}
                self.assertGreater(len(seen), 5)
                self.assertEqual(maps.setdefault(data, seen), seen, data)
            self.assertEqual(len(set(map(frozenset, maps.values()))), 5)

    def test_names(self):
        """Catches a name that QEMU reads as an option, or finds elsewhere."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        os.environ['SNAPSHOT_VM_DIR'] = 'a,b=c'
        path = self.describe_guest(
            'coverage = tcg,mode=kernel', 'map = 16K',
            '-chardev file,id=own,path=${directory}/own', name='v,m')
        with self.lib.Machine(path) as vm:
            self.assertEqual(vm.run(b'FUZ!C').result, self.lib.CRASH)
            self.assertTrue(any(vm.run(b'').coverage))
            self.assertEqual(sorted(file.name for file in
                                    vm.directory.iterdir()),
                             ['channel', 'control', 'daemon', 'lock', 'map',
                              'own', 'qmp', 'state'])
        self.assertEqual(os.listdir(), ['a,b=c'])
        self.lib.stop(path)

    def test_mute(self):
        path = self.describe_guest('boot = 3', options='mute=1')
        self.assert_fails(self.lib.E_NOT_READY,
                          r'(?s)READY in 3 s.*the guest is there',
                          self.lib.Machine, path)

    def test_wrong_option(self):
        path = self.describe_guest('-device nonesuch')
        self.assert_fails(self.lib.E_START,
                          r"(?s)status 1.*'nonesuch' is not a valid",
                          self.lib.Machine, path)

    def test_programs(self):
        """snapshot-vm, as the README tells"""
        host = host_programs()
        path = self.describe_guest()
        files = []
        for data in (b'FUZ?', b'FUZ!C', b'FUZ!P'):
            files.append(self.scratch_file(f'input{len(files)}'))
            Path(files[-1]).write_bytes(data)

        def run(*args, status=0):
            done = subprocess.run([host / 'snapshot-vm', *args], text=True,
                                  stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL)
            self.assertEqual(done.returncode, status)
            return done.stdout

        self.assertRegex(run('start', path), 'instance 0 is READY')
        self.assertRegex(run('status', path), '^0: .* nobody has it')
        output = run('run', path, *files).splitlines()
        self.assertRegex(output[0], r'input0: ok .* 4 edges$')
        self.assertRegex(output[1], r'input1: crash .*: the planted crash$')
        self.assertRegex(output[2], r'input2: crash \(panic\)')
        self.assertIn('Kernel panic', run('console', path))
        self.assertRegex(run('measure', path, files[0], '1'), r'^[1-9]\d+ runs')
        self.assertEqual(run('stop', path), '1 ended\n')
        run('nonsense', path, status=2)

    def test_speed(self):
        """
        Tells how fast the loop is beside the guest's own restores. Catches a
        loop that waits for something.
        """
        path = self.describe_guest()
        with self.lib.Machine(path):
            pass
        seed = self.scratch_file('seed')
        Path(seed).write_bytes(b'FUx')
        # As AFL++ does it, all are on one CPU.
        command = ['taskset', '-c', str(min(os.sched_getaffinity(0))),
                   host_programs() / 'snapshot-vm', 'measure', path, seed, '3']
        loop = int(subprocess.check_output(command, text=True).split()[0])
        self.lib.stop(path)
        own = self.own_restores()
        print(f'# {loop} runs/s, {own} restores/s, {loop / own:.2f}')
        self.assertGreater(loop, own / 20)

    def own_restores(self):
        """Of a guest that writes to as many pages"""
        console = Path(self.scratch_file('marks'))
        self.vm.add_args('-nodefaults', '-machine', 'q35', '-accel', 'tcg',
                         '-m', '32M', '-rtc', 'clock=vm', '-kernel',
                         str(guest()), '-append',
                         'case=bench pages=4 mark=100', '-chardev',
                         f'file,id=debug,path={console}', '-device',
                         'isa-debugcon,iobase=0xe9,chardev=debug', '-device',
                         'snapshot')
        self.vm.launch()
        self.wait_until(lambda: console.exists() and console.stat().st_size)
        start, before = time.monotonic(), console.stat().st_size
        time.sleep(3)
        marks = console.stat().st_size - before
        elapsed = time.monotonic() - start
        self.vm.shutdown()
        return int(marks * 100 / elapsed)


class Linux(Guest):
    """
    snapshot-linux/fuzz.c, which has children process the inputs. Catches
    buffers that are elsewhere when a program has forked, and a kernel's end
    that is not told or not undone.
    """

    LETTERS = b''

    def test_linux(self):
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX') or
                     HERE.parents[1] / 'build' / 'linux')
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: run scripts/linux-guest')
        path = self.describe(
            f'qemu = {self.qemu_bin}', 'boot = 300', 'timeout = 1000',
            '-accel tcg', '-m 256', f'-kernel {linux}/vmlinuz',
            f'-initrd {linux}/initramfs', '-device pvpanic', '-append '
            'console=ttyS0 panic=-1 no_timer_check quiet snapshot.run=fuzz')
        lib = self.lib
        with lib.Machine(path) as vm:
            self.assertEqual(vm.input_size, 5000)
            for data in (b'', b'FUZ', b'FU' + bytes(4998), b'FUZ!x') * 5:
                self.check_run(vm, data)
            self.check_run(vm, b'FUZ!C', lib.CRASH, lib.GUEST, 'signal 6')
            self.check_run(vm, b'FUZ!H', lib.HANG, lib.HOST_TIME)
            # No driver of pvpanic's is there: panic=-1 resets.
            run = vm.run(b'FUZ!P', lib.Limits())
            self.assertEqual(run.result, lib.CRASH)
            self.assertIn(run.cause, (lib.PANIC, lib.RESET))
            self.wait_until(
                lambda: 'Kernel panic' in lib.console(vm.directory))
            self.check_run(vm, b'FUZ!x')


if __name__ == '__main__':
    MachinesTest.main()

#!/usr/bin/env python3
#
# Functional test of the snapshot device on a bare-metal guest
#
# SPDX-License-Identifier: GPL-2.0-or-later

import functools
import os
from pathlib import Path
import platform
import re
from statistics import median
import subprocess
import sys
import tempfile
import time

from qemu.machine.machine import VMLaunchFailure
from qemu_test import QemuSystemTest
from snapshot import build_guest, kvm_copies_page_tables

# How often a case does what it does, at most
MOST = os.getenv('QEMU_TEST_SNAPSHOT_MOST') or (
    None if os.getenv('QEMU_TEST_ALLOW_SLOW') else '300')

# What the guest tells isa-debug-exit
PASSED, FAILED = 33, 35


@functools.cache
def guest_directory():
    return tempfile.TemporaryDirectory(prefix='qemu_func_test_snapshot_')


@functools.cache
def guest_image():
    """The guest's path; why there is none; exactly one."""
    image = os.getenv('QEMU_TEST_SNAPSHOT_GUEST')
    if image:
        return image, None
    image = Path(guest_directory().name, 'guest.elf')
    try:
        build_guest(image)
    except OSError as e:
        return None, f'no compiler for the guest: {e}'
    except subprocess.CalledProcessError as e:
        if platform.machine() != 'x86_64':
            return None, f'no compiler for x86: {e.stdout}'
        raise AssertionError(f'the guest does not compile: {e.stdout}') from e
    return image, None


class Guest:
    """
    A case of the guest each, to be found by its name in the guest's sources,
    where it is said what it catches. The guest judges for itself; where it
    takes a look from outside, the judgement is here.
    """

    accel = 'tcg'
    device = 'snapshot'
    most = 100      # restores with more than one CPU, where they are slow
    clock_restores, clock_work = 1000, 2000     # us between two of them
    ram, vram, timers = {}, {}, {}

    def setUp(self):
        super().setUp()
        self.require_accelerator(self.accel)
        self.require_device('name "snapshot"')
        self.set_machine(self.machine)
        self.console = Path(self.scratch_file('console'))

    def start(self, case, *args, cpus=1, memory='32M', serial='null',
              accel=None, **options):
        image, reason = guest_image()
        if reason:
            self.skipTest(reason)
        if self.most and cpus > 1:
            options['n'] = min(options.get('n', self.most), self.most)
        if MOST:
            options['most'] = MOST
        options = ' '.join(f'{k}={v}' for k, v in options.items())
        self.vm.add_args('-nodefaults', '-accel', accel or self.accel,
                         '-m', memory, '-smp', str(cpus), '-rtc', 'clock=vm',
                         '-kernel', str(image),
                         '-append', f'case={case} cpus={cpus} {options}',
                         '-chardev', f'file,id=debug,path={self.console}',
                         '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                         '-device', 'isa-debug-exit,iobase=0xf4,iosize=4',
                         '-device', self.device, '-serial', serial, *args)
        self.vm.launch()

    def output(self):
        try:
            return self.console.read_text(errors='replace')
        except FileNotFoundError:
            return ''

    def finish(self, timeout=600):
        """Wait for the guest's own end, which must be a success."""
        try:
            self.vm.wait(timeout=timeout)
        except Exception as e:
            self.fail(f'no end ({e!r}): {self.output()[-500:]}')
        output = self.output()
        self.log.info('%s', output[-2000:])
        self.assertEqual(self.vm.exitcode(), PASSED,
                         output[-500:] + (self.vm.get_log() or ''))
        return output

    def run_case(self, case, *args, **options):
        self.start(case, *args, **options)
        return self.finish()

    def wait_for(self, text, count=1):
        end = time.monotonic() + 60
        while self.output().count(text) < count:
            self.assertTrue(self.vm.is_running(), self.output()[-500:])
            self.assertLess(time.monotonic(), end, f'no "{text}"')
            time.sleep(0.01)

    # Commands of QMP's, by the guest

    def sockets(self):
        """(monitor, port) of a guest that speaks to the monitor"""
        directory = tempfile.TemporaryDirectory(prefix='qmp')
        self.addCleanup(directory.cleanup)
        return [f'{directory.name}/{name}' for name in ('monitor', 'port')]

    def test_qmp(self):
        """The recipe of the manual: two chardevs of QEMU's, joined"""
        monitor, _ = self.sockets()
        self.start('qmp', '-chardev',
                   f'socket,id=m,path={monitor},server=on,wait=off',
                   '-mon', 'chardev=m,mode=control',
                   '-chardev', f'socket,id=g,path={monitor}',
                   serial='chardev:g', greeting=1)
        self.assertEqual(self.finish().count('restored'), 9)

    def test_qmp_filter(self):
        """
        The same with what stands between the two, which passes nothing else.
        Catches: a filter that lets a guest end QEMU, that loses an answer.
        """
        monitor, port = self.sockets()
        self.start('qmp', '-S', '-chardev',
                   f'socket,id=m,path={monitor},server=on,wait=off',
                   '-mon', 'chardev=m,mode=control',
                   '-chardev', f'socket,id=g,path={port},server=on,wait=off',
                   serial='chardev:g', hostile=1)
        root = Path(__file__).resolve().parents[2]
        process = subprocess.Popen(
            [sys.executable, root / 'contrib' / 'snapshot' /
             'snapshot-qmp-filter', monitor, port])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        # What the guest writes to a port that nobody has is lost.
        end = time.monotonic() + 60
        while any(chardev['filename'].startswith('disconnected')
                  for chardev in self.vm.cmd('query-chardev')):
            self.assertLess(time.monotonic(), end, 'the filter is not there')
            time.sleep(0.01)
        self.vm.cmd('cont')
        self.assertEqual(self.finish().count('restored'), 9)
        self.assertEqual(process.wait(10), 0)

    # Precision

    def test_precise(self):
        self.run_case('precise', memory='8M', n=500)

    def test_precise_smp2(self):
        self.run_case('precise', memory='8M', cpus=2, n=200)

    def test_precise_smp4(self):
        self.run_case('precise', memory='8M', cpus=4, n=200)

    def test_precise_restores(self):
        self.run_case('precise_restores')

    def run_crowd(self, *devices):
        args = []
        for device in devices:
            if '%' in device:
                args += ['-blockdev', f'null-co,node-name=d{len(args)},'
                         'read-only=on,size=1048576']
                device = device.replace('%', f'drive=d{len(args) - 2}')
            args += ['-device', device]
        self.run_case('precise_restores', *args, n=200)

    def test_crowd_scsi(self):
        """
        Catches a device that counts on the main loop, or on a machine that is
        stopped, when a vCPU's thread looks what changed. Not am53c974: the
        guest does not come to run, for SeaBIOS waits for its disk for ever.
        """
        self.run_crowd('virtio-scsi-pci,id=v', 'scsi-hd,bus=v.0,%',
                       'lsi53c895a,id=l', 'scsi-cd,bus=l.0,%',
                       'megasas,id=m', 'scsi-hd,bus=m.0,%',
                       'mptsas1068,id=n', 'scsi-hd,bus=n.0,%',
                       'pvscsi,id=p', 'scsi-hd,bus=p.0,%',
                       'usb-ehci,id=e', 'usb-storage,bus=e.0,%')

    def test_crowd_others(self):
        """Catches the same in other devices."""
        self.run_crowd('nvme,serial=1,%', 'sdhci-pci', 'virtio-gpu-pci',
                       'virtio-balloon-pci', 'virtio-keyboard-pci',
                       'virtio-serial-pci', 'qemu-xhci,id=x',
                       'usb-tablet,bus=x.0', 'usb-hub,bus=x.0', 'edu',
                       'e1000e', 'rtl8139', 'pcnet', 'vmxnet3', 'i82559c',
                       'ipmi-bmc-sim,id=b', 'isa-ipmi-kcs,bmc=b',
                       'pvpanic', 'vmgenid', 'i6300esb')

    def test_precise_restores_smp4(self):
        self.run_case('precise_restores', cpus=4, n=3000)

    # The CPU

    def test_gprs(self):
        self.run_case('gprs')

    def test_segments(self):
        self.run_case('segments')

    def test_fpu(self):
        self.run_case('fpu')

    def test_fpu_avx(self):
        if self.accel == 'kvm':
            self.run_case('fpu', '-cpu', 'max')
        else:
            self.run_case('fpu', '-cpu', 'max', avx=1)

    def test_system(self):
        self.run_case('system')

    def test_breakpoint(self):
        self.run_case('breakpoint')

    def test_msrs(self):
        self.run_case('msrs')

    def test_msrs_max(self):
        self.run_case('msrs', '-cpu', 'max')

    def test_paging(self):
        self.run_case('paging')

    def test_page_tables(self):
        self.run_case('page_tables')

    def test_long_mode(self):
        self.run_case('long_mode')

    def test_svm(self):
        self.run_case('svm', '-cpu', 'max')

    # Memory

    def test_smc(self):
        self.run_case('smc')

    def test_smc_slots(self):
        self.run_case('smc_slots')

    def test_kept(self):
        self.run_case('kept')

    def test_ram(self):
        self.run_case('ram', **self.ram)

    def test_slots(self):
        self.run_case('slots')

    def test_vram(self):
        self.run_case('vram', '-vga', 'std', **self.vram)

    def test_pam(self):
        self.run_case('pam')

    def test_windows(self):
        self.run_case('windows')

    def test_dma(self):
        blob = Path(self.scratch_file('blob'))
        blob.write_bytes(b'\xb8\x0d\x60\x0d\x60\xc3' + os.urandom(65530))
        self.run_case('dma', '-fw_cfg',
                      f'name=opt/snapshot-test/blob,file={blob}')

    def test_screen(self):
        """
        The host looks at the screen before and after. Catches a restore that
        does not tell the display what it changed.
        """
        self.vm.set_console()
        self.start('screen', '-vga', 'std', serial='none')
        seen = {}
        for i in range(4):
            for state in 'restored' if i else 'saved', 'changed':
                self.wait_for('SCREEN', 2 * i + 1 + (state == 'changed'))
                image = self.scratch_file('screen')
                self.vm.cmd('screendump', filename=image)
                seen[state] = Path(image).read_bytes()
                self.vm.console_socket.sendall(b'x')
                if state == 'restored':
                    self.assertEqual(seen['restored'], seen['saved'])
            self.assertNotEqual(seen['changed'], seen['saved'])
        self.finish()

    # Time

    def test_timer_armed(self):
        self.run_case('timer_armed', **self.timers)

    def test_timer_idle(self):
        self.run_case('timer_idle', **self.timers)

    def test_timer_pending(self):
        self.run_case('timer_pending', **self.timers)

    def clocks(self, *args, **options):
        """
        By clock: its name, what it shows after each restore since just before
        the save, and what it shows when the work after that is done.
        """
        output = self.run_case('clocks', *args, **options)
        found = {word: [[int(n, 16) for n in line.split()]
                        for line in re.findall(f'^{word} (.*)$', output, re.M)]
                 for word in ('CLOCK', 'WORK')}
        names = ['TSC', 'HPET', 'PM timer']
        if self.accel == 'kvm':
            names.append('kvmclock')
        for i, name in enumerate(names):
            yield (name, [c[i] for c in found['CLOCK']],
                   [w[i] for w in found['WORK']])

    def clocks_go_back(self, **options):
        for name, shown, done in self.clocks(**options):
            work = median(d - s for s, d in zip(shown, done))
            self.log.info('%s: %d to %d, work %d', name, min(shown),
                          max(shown), work)
            # How long the save itself took shows in all.
            self.assertLess(median(shown) - min(shown), work / 2, name)
            half = len(shown) // 2
            # What creeps adds up; a host that is slow for a while does not.
            self.assertLess(min(shown[half:]),
                            3 * min(shown[:half]) + work / 20, name)

    def test_clocks(self):
        """Catches a clock that does not go back, and one that creeps."""
        self.clocks_go_back(n=self.clock_restores, work=self.clock_work)

    def test_irqs(self):
        self.run_case('irqs')

    # Devices

    def test_registers(self):
        self.run_case('registers')

    def test_queues(self):
        self.run_case('queues')

    def test_robust(self):
        self.run_case('robust')

    def test_bar(self):
        self.run_case('bar')

    def test_reset(self):
        output = self.run_case('reset')
        self.assertEqual(output.count('RESET'), 3)

    def test_stop(self):
        """
        Catches a restore that starts a machine which the user has stopped,
        and one that floods the monitor with STOP and RESUME.
        """
        self.start('endless')
        for _ in range(20):
            self.wait_for('\n', self.output().count('\n') + 1)
            self.vm.cmd('stop')
            self.assertEqual(self.vm.cmd('query-status')['status'], 'paused')
            before = self.output()
            time.sleep(0.05)
            self.assertEqual(self.vm.cmd('query-status')['status'], 'paused')
            self.assertEqual(self.output(), before)
            self.vm.cmd('cont')
        self.wait_for('\n', self.output().count('\n') + 5)
        events = [e['event'] for e in self.vm.get_qmp_events(wait=False)]
        self.assertLessEqual(events.count('STOP'), 20)
        self.assertLessEqual(events.count('RESUME'), 21)
        self.vm.shutdown()

    # More than one CPU

    def test_smp2(self):
        self.run_case('smp', cpus=2)

    def test_smp4(self):
        self.run_case('smp', cpus=4)

    def test_smp_clocks(self):
        self.run_case('smp_clocks', cpus=2)

    def test_smp_halted(self):
        self.run_case('smp_halted', cpus=2)

    def test_smp_running(self):
        self.run_case('smp_running', cpus=2)

    def test_smp_waiting(self):
        self.run_case('smp_waiting', cpus=4)

    def test_smp_cross(self):
        self.run_case('smp_cross', cpus=4)

    def test_smp_race(self):
        self.run_case('smp_race', cpus=4)


class Tcg(Guest):
    """What only TCG has: threads to choose, counted instructions"""

    ICOUNT = ('-icount', 'shift=3,sleep=off')

    def test_a20(self):
        self.run_case('a20')            # KVM has no A20

    def test_smp_remap(self):
        self.run_case('smp_remap', cpus=4)

    def test_single_thread_smp_remap(self):
        self.run_case('smp_remap', cpus=2, accel='tcg,thread=single',
                      changes=20)

    def test_single_thread_precise(self):
        self.run_case('precise', memory='8M', cpus=2, n=100,
                      accel='tcg,thread=single')

    def test_single_thread_smp(self):
        self.run_case('smp', cpus=4, accel='tcg,thread=single', n=40)

    def test_single_thread_smp_waiting(self):
        self.run_case('smp_waiting', cpus=2, accel='tcg,thread=single')

    def test_icount_precise(self):
        self.run_case('precise', *self.ICOUNT, memory='8M', n=100)

    def test_icount_precise_restores(self):
        self.run_case('precise_restores', *self.ICOUNT, n=3000)

    def test_icount_timer_armed(self):
        self.run_case('timer_armed', *self.ICOUNT)

    def test_icount_timer_pending(self):
        self.run_case('timer_pending', *self.ICOUNT)

    def test_icount_smp(self):
        self.run_case('smp', *self.ICOUNT, cpus=2)

    def test_icount_clocks(self):
        """
        With instructions counted, time is exact: catches one instruction too
        many, or too few, between a restore and the reading of a clock.
        """
        for name, shown, _ in self.clocks(*self.ICOUNT, n=300):
            self.assertEqual(set(shown), {shown[0]}, name)


class PcTcg(Tcg, QemuSystemTest):
    machine = 'pc'

    def test_ide(self):
        self.run_case('ide', '-drive', 'if=ide,index=2,media=cdrom')


class Q35Tcg(Tcg, QemuSystemTest):
    machine = 'q35'

    def test_kept_in_log(self):
        """
        Catches pages that are trapped each time, though they are written to
        each time; and those that never leave the log again.
        """
        log = Path(self.scratch_file('trace'))
        self.run_case('kept', '-trace', 'ram_snapshot_put_back', '-D',
                      str(log), n=200)
        found = [tuple(map(int, m)) for m in re.findall(
            r'(\d+) pages in the log, (\d+) differed, (\d+) stay',
            log.read_text())]
        self.assertEqual(len(found), 200)
        logged, differed, kept = zip(*found)
        self.assertGreater(median(kept), 32)
        self.assertLess(max(kept), 128)
        self.assertGreater(max(a - b for a, b in zip(logged, differed)), 0)

    def test_kept_migrated(self):
        state = self.scratch_file('state')
        self.start('kept_migrated')
        self.wait_for('.', 2)
        self.vm.cmd('migrate', uri=f'file:{state}')
        end = time.monotonic() + 60
        while self.vm.cmd('query-migrate').get('status') != 'completed':
            self.assertLess(time.monotonic(), end)
            time.sleep(0.01)
        there = self.get_vm(name='there')
        there.add_args(*(arg.replace(str(self.console), f'{self.console}2')
                         for arg in self.vm.args), '-incoming', f'file:{state}')
        self.console = Path(f'{self.console}2')
        there.launch()
        self.wait_for('.', 2)
        self.assertNotIn('FAIL', self.output())


class PcTcgRemap(PcTcg):
    device = 'snapshot,ram=remap'
    most = 20


class Kvm(Guest):
    accel = 'kvm'
    # Where KVM's processor is emulated, reading a clock takes milliseconds;
    # where KVM emulates, each access to memory takes microseconds.
    clock_restores, clock_work = 100, 200000
    ram, vram = {'memory': '8M', 'n': 14}, {'mb': 2}
    # KVM's timers do not stop with the machine: it must take less than they,
    # and where KVM's processor is emulated, it does not.
    timers = {'memory': '8M', 'period': 40000,
              'least': 0 if 'QEMU_TEST_SNAPSHOT_MOST' in os.environ else 50}

    def start(self, case, *args, **options):
        try:
            super().start(case, '-action', 'shutdown=pause', *args, kvm=1,
                          **options)
        except VMLaunchFailure as e:
            # QEMU ends where KVM refuses what it said that it has.
            if refused := re.search(r'failed to set (MSR \S+) to',
                                    e.output or ''):
                self.skipTest(f'this KVM cannot set {refused[1]}')
            raise

    def finish(self, timeout=600):
        """
        KVM may emulate a guest, as it does where the host has no hardware for
        it, and not know every instruction. What it did not know before the
        first restore is no fault of a restore's.
        """
        end = time.monotonic() + timeout
        while not self.vm.events_wait([('SHUTDOWN', None), ('STOP', None)],
                                      timeout=1):
            if not self.vm.is_running() or time.monotonic() > end:
                self.fail(f'no end: {self.output()[-500:]}')
        info = self.vm.cmd('x-query-snapshot-device')
        self.vm.shutdown()
        output, log = self.output(), self.vm.get_log()
        self.log.info('%s', output[-2000:])
        if not info['restores'] and '\nemulation failure\n' in log:
            code = re.search('<(.*?)>(( [0-9a-f]{2}){3})', log)
            self.skipTest('this KVM cannot emulate the instruction '
                          f'{code[1]}{code[2]}')
        if skipped := re.search(r'(?m)^SKIP \S+ (.*)', output):
            self.skipTest(skipped[1])
        self.assertRegex(output, r'(?m)^PASS ', log)
        self.judge(info)
        return output

    def judge(self, info):
        pass

    def test_nested_tables(self):
        self.run_case('nested_tables', '-cpu', 'max')

    def test_clocks_young(self):
        """
        Less than a second after the TSC's 0: catches KVM's taking the restore
        for an attempt to keep vCPUs in step, and ignoring it.
        """
        self.clocks_go_back(n=20, work=200000, young=1)


class KvmVerified(Kvm):
    """
    Catches a page that a vCPU wrote to and KVM did not tell of, or QEMU did
    not listen, and device state that does not go back: all is compared after
    each restore.
    """

    device = 'snapshot,ram=dirty,verify=on'

    def setUp(self):
        if kvm_copies_page_tables():
            self.skipTest('ram=dirty is refused: this KVM has no '
                          'two-dimensional paging')
        super().setUp()

    def judge(self, info):
        self.assertEqual(info['verified'], info['restores'])
        self.assertEqual(info['mismatched'], 0, info['mismatches'])

    def test_smi(self):
        self.run_case('smi')


class PcKvm(Kvm, QemuSystemTest):
    machine = 'pc'

    def test_auto(self):
        """
        Catches ram=auto not being ram=dirty where KVM allows that, or being it
        where KVM would go on with page tables of before; and memory slots that
        start with all pages dirty: a restore sets up some anew.
        """
        self.start('endless')
        self.wait_for('\n', 3)
        info = self.vm.cmd('x-query-snapshot-device')
        if kvm_copies_page_tables():
            self.assertEqual(info['ram'], 'remap')
        else:
            self.assertEqual(info['ram'], 'dirty')
            self.assertLess(info['last-pages'], 128)
        self.vm.shutdown()

    def test_tlb_flush(self):
        """
        Catches a TLB that nobody flushes: pages of another slot are copied,
        and KVM has logged none, for the machine is stopped. Where KVM's
        processor is emulated, its TLB hides that: so what is done is looked at.
        """
        if kvm_copies_page_tables():
            self.skipTest('this KVM has no two-dimensional paging')
        log = Path(self.scratch_file('trace'))
        self.start('endless', '-trace', 'kvm_x86_flush_tlb', '-D', str(log))
        self.wait_for('\n', 3)
        self.vm.cmd('stop')
        self.vm.cmd('x-snapshot-device-save', slot=1)
        flushed = log.read_text().count('kvm_x86_flush_tlb')
        for slot in 0, 1, 0:
            self.vm.cmd('x-snapshot-device-restore', slot=slot)
            info = self.vm.cmd('x-query-snapshot-device')
            self.assertGreater(info['last-pages'], 0)
            flushed += 1
            self.assertEqual(log.read_text().count('kvm_x86_flush_tlb'),
                             flushed)
        self.vm.cmd('x-snapshot-device-restore', slot=0)
        self.assertEqual(log.read_text().count('kvm_x86_flush_tlb'), flushed)
        self.vm.shutdown()

    def test_dirty_refused(self):
        """Catches ram=dirty where KVM does not see that page tables change."""
        if not kvm_copies_page_tables():
            self.skipTest('this KVM has two-dimensional paging')
        self.vm.add_args('-accel', 'kvm', '-S', '-device', 'snapshot,ram=dirty')
        with self.assertRaises(VMLaunchFailure) as failure:
            self.vm.launch()
        self.assertIn('ram=dirty needs a KVM with two-dimensional paging',
                      failure.exception.output)


class PcKvmRing(KvmVerified, QemuSystemTest):
    """Pages that vCPUs write to in rings, some of which become full"""

    machine = 'pc'

    def start(self, case, *args, **options):
        super().start(case, *args, accel='kvm,dirty-ring-size=1024', **options)


class PcKvmRemap(Kvm, QemuSystemTest):
    machine = 'pc'
    device = 'snapshot,ram=remap'

    def setUp(self):
        # Which test_auto asserts, and there each case takes many seconds.
        if kvm_copies_page_tables():
            self.skipTest('ram=auto is ram=remap here: PcKvm has the same')
        super().setUp()


class Q35Kvm(KvmVerified, QemuSystemTest):
    machine = 'q35'


if __name__ == '__main__':
    QemuSystemTest.main()

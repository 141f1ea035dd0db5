#!/usr/bin/env python3
#
# Functional test of -object tcg-coverage on a bare-metal guest
#
# SPDX-License-Identifier: GPL-2.0-or-later

import mmap
import os
from pathlib import Path
import re
import subprocess
import time

from qemu_test import QemuSystemTest
from snapshot import build_guest

SIZE = 65536


def xxhash2(value):
    """QEMU's hash of 64 bits, include/qemu/xxhash.h"""
    p1, p2, p3, p4 = 2654435761, 2246822519, 3266489917, 668265263

    def u32(x):
        return x & 0xffffffff

    def rol(x, n):
        return u32(x << n) | u32(x) >> (32 - n)

    start = ((1 + p1 + p2, value), (1 + p2, value >> 32), (1, 0), (1 - p1, 0))
    lanes = [u32(rol(u32(seed + u32(word) * p2), 13) * p1)
             for seed, word in start]
    h = u32(sum(map(rol, lanes, (1, 7, 12, 18))) + 28)
    for _ in range(4):
        h = u32(rol(h, 17) * p4)
    h = u32((h ^ h >> 15) * p2)
    h = u32((h ^ h >> 13) * p3)
    return h ^ h >> 16


class Coverage(QemuSystemTest):
    """
    What is counted is predicted, byte for byte, from the addresses of the
    guest's blocks.
    """

    PASSES = int(os.getenv('QEMU_TEST_SNAPSHOT_PASSES', '1000'))
    RESTORES = int(os.getenv('QEMU_TEST_SNAPSHOT_RESTORES', '100000'))
    DEADLINE = 120

    IO, MODIFY = 1, 2

    def setUp(self):
        super().setUp()
        self.require_accelerator('tcg')
        self.require_device('name "snapshot"')
        self.guest = self.scratch_file('guest.elf')
        build_guest(self.guest)
        symbols = subprocess.run(['nm', self.guest], text=True, check=True,
                                 stdout=subprocess.PIPE).stdout
        self.symbols = {name: int(value, 16) for value, name in
                        re.findall(r'^(\w+) \w cover_(\w+)$', symbols, re.M)}
        self.console = Path(self.scratch_file('console'))
        self.map_file = Path(self.scratch_file('map'))
        self.map_file.write_bytes(bytes(SIZE))
        with open(self.map_file, 'r+b') as f:
            self.map = mmap.mmap(f.fileno(), SIZE)
        self.dones = 0

    def ranges(self, base=0, first='start', last='end'):
        return [f'{self.symbols[first] - base:#x}..'
                f'{self.symbols[last] - base - 1:#x}']

    def start(self, case, *args, cpus=1, accel='tcg', coverage=None,
              device='snapshot', **options):
        """Starts the guest, and has it counted if @coverage is not None."""
        options = ' '.join(f'{k}={v}' for k, v in options.items())
        self.set_machine('pc')
        self.vm.add_args('-nodefaults', '-accel', accel, '-m', '32',
                         '-smp', str(cpus), '-rtc', 'clock=vm',
                         '-kernel', self.guest,
                         '-append', f'case={case} cpus={cpus} {options}',
                         '-chardev', f'file,id=debug,path={self.console}',
                         '-device', 'isa-debugcon,iobase=0xe9,chardev=debug',
                         '-device', device,
                         '-object', 'memory-backend-file,id=map,share=on,'
                         f'size={SIZE},mem-path={self.map_file}', *args)
        self.vm.launch()
        if coverage is not None:
            self.count(**coverage)

    def count(self, **properties):
        self.vm.cmd('object-add', qom_type='tcg-coverage', id='cov',
                    memdev='map', **properties)

    def wait_done(self):
        """Waits until the guest has executed its code once more."""
        self.dones += 1
        end = time.monotonic() + self.DEADLINE
        while True:
            text = self.console.read_text() if self.console.exists() else ''
            if text.count('DONE') >= self.dones and text.endswith('\n'):
                return text
            self.assertNotIn('FAIL', text)
            self.assertTrue(self.vm.is_running())
            self.assertLess(time.monotonic(), end, f'not done: {text[-300:]}')
            time.sleep(0.0002)

    def wait_halted(self):
        while 'HLT=1' not in self.vm.cmd('human-monitor-command',
                                         command_line='info registers'):
            time.sleep(0.001)

    def run_once(self, halted=False):
        """Returns the map of a run; the first is none: it has a past."""
        self.map[:] = bytes(SIZE)
        self.vm.cmd('x-snapshot-device-restore', slot=0)
        self.wait_done()
        if halted:
            self.wait_halted()
        return self.map[:]

    def path(self, path=0, loops=1):
        names = ['start']
        if path & self.IO:
            names += ['io']
        names += ['join']
        if path & self.MODIFY:
            names += ['modify', 'function', 'return']
        return names + ['loop'] * loops + ['last']

    def predict(self, *chains, base=0):
        """The map after paths, each of which begins without a past"""
        block = {name: xxhash2((address - base) % 2 ** 64) % SIZE
                 for name, address in self.symbols.items()}
        counts = [0] * SIZE
        for chain in chains:
            prev = 0
            for name in chain:
                counts[prev ^ block[name]] += 1
                prev = block[name] >> 1
        # Behind 255 comes 1.
        return bytes((n - 1) % 255 + 1 if n else 0 for n in counts)

    def assertMap(self, got, want):     # pylint: disable=invalid-name
        if got != want:
            names = {}
            for a in self.symbols:
                names[xxhash2(self.symbols[a]) % SIZE] = a
            self.fail('the map differs: ' + ', '.join(
                f'[{i:#x}] {got[i]} not {want[i]}'
                for i in range(SIZE) if got[i] != want[i])[:800])

    def check_path(self, path, *args, loops=1, passes=3, coverage=None,
                   base=0, times=1, **options):
        coverage = {'ranges': self.ranges(base), **(coverage or {})}
        self.start('coverage', *args, coverage=coverage, path=path,
                   loops=loops, **options)
        self.wait_done()
        want = self.predict(*[self.path(path, loops)] * times, base=base)
        for _ in range(passes):
            self.assertMap(self.run_once(), want)

    # What is counted

    def test_branches(self):
        """Catches edges that are missing, wrong, or counted twice."""
        self.check_path(0)
        self.assertEqual(sum(map(bool, self.map[:])), 4)

    def test_counter(self):
        self.check_path(0, loops=200)

    def test_counter_overflow(self):
        """Catches an edge that was taken 256 times and looks as if never."""
        self.check_path(0, loops=257)

    def test_counter_overflows(self):
        self.check_path(0, loops=100000)

    def test_io(self):
        """Catches a block that begins where another was cut for its I/O."""
        self.check_path(self.IO)

    def test_modify(self):
        """
        So it is where code that is being executed is written to; it is
        translated anew in each run. Catches ids that are made up at that time.
        """
        self.check_path(self.MODIFY, passes=100)

    def test_passes(self):
        self.check_path(self.IO | self.MODIFY, loops=3, passes=self.PASSES)

    def test_single_thread(self):
        self.check_path(self.IO | self.MODIFY, accel='tcg,thread=single')

    def test_two_cpus(self):
        """Catches a CPU that goes on where another one has been."""
        self.check_path(self.IO, cpus=2, times=2)

    def test_two_cpus_single_thread(self):
        self.check_path(self.IO, cpus=2, times=2, accel='tcg,thread=single')

    def test_all_code(self):
        """
        Without a filter: firmware, the way here, and each instruction of the
        guest's, which does not know where the host looks.
        """
        self.start('coverage', coverage={}, path=self.IO | self.MODIFY)
        self.wait_done()
        self.wait_halted()      # its last instructions are counted as well
        first = self.run_once(halted=True)
        self.assertGreater(sum(map(bool, first)), 20)
        for _ in range(100):
            self.assertMap(self.run_once(halted=True), first)

    # Interrupts

    def check_interrupts(self, *args, count, passes, **options):
        ranges = self.ranges() + [f'{self.symbols["handler"]:#x}+1']
        self.start('coverage_irq', *args, path=self.IO | self.MODIFY,
                   coverage={'ranges': ranges, 'interrupts': count}, **options)
        self.wait_done()
        total = 0
        # On a busy host, a run can be over before its timer's thread has run.
        for n in range(20 * passes):
            if n >= passes and total > 5:
                break
            got = self.run_once()
            text = self.console.read_text()
            came = int(re.findall(r'DONE ([0-9a-f]+)', text)[-1], 16)
            total += came
            chains = [self.path(self.IO | self.MODIFY, options['loops']) *
                      options.get('repeat', 1)]
            chains += [['handler']] * (came if count else 0)
            self.assertMap(got, self.predict(*chains))
        self.assertGreater(total, 5, 'no interrupts')

    def test_interrupts(self):
        """Catches edges from what is interrupted to a handler, and back."""
        self.check_interrupts(count=True, loops=1000000, period=300007,
                              passes=20)

    def test_interrupts_io(self):
        """As an interrupt comes where a block goes on behind its I/O"""
        self.check_interrupts(count=True, loops=1, repeat=2000, period=50021,
                              passes=self.PASSES // 10)

    def test_no_interrupts(self):
        self.check_interrupts(count=False, loops=1000000, period=300007,
                              passes=20)

    def test_reset_in_handler(self):
        """
        Catches a CPU that is in a handler for ever, of which nothing is
        counted, when it was reset there.
        """
        # On a busy host, the first interrupt must not come before the code.
        self.start('coverage_irq', path=self.IO | self.MODIFY, hang=1,
                   loops=100000000, period=20000003,
                   coverage={'ranges': self.ranges(), 'interrupts': False})
        first = xxhash2(self.symbols['start']) % SIZE
        for _ in range(3):
            self.wait_done()
            self.assertTrue(self.map[first], 'it does not start')
            self.map[:] = bytes(SIZE)
            self.vm.cmd('system_reset')

    def test_icount_interrupts(self):
        """
        With -icount, interrupts come amid a block. Catches a block that begins
        there.
        """
        self.check_interrupts('-icount', 'shift=4', count=True, loops=3000,
                              period=10007, passes=self.PASSES)

    def test_icount_no_interrupts(self):
        self.check_interrupts('-icount', 'shift=4', count=False, loops=3000,
                              period=10007, passes=self.PASSES)

    def check_icount(self, shift):
        """Catches anything of the host's that shows in the map."""
        self.start('coverage_irq', '-icount', f'shift={shift}', coverage={},
                   path=self.IO | self.MODIFY, loops=300, period=10007)
        self.wait_done()
        first = self.run_once(halted=True)
        for _ in range(self.PASSES):
            self.assertMap(self.run_once(halted=True), first)

    def test_icount(self):
        self.check_icount(4)

    def test_icount_auto(self):
        self.check_icount('auto')

    # Filters

    def test_range(self):
        """Catches blocks that count out of the ranges, and the reverse."""
        self.start('coverage', path=self.IO | self.MODIFY, coverage={
            'ranges': self.ranges(last='modify') +
            self.ranges(first='last', last='function')})
        self.wait_done()
        self.assertMap(self.run_once(),
                       self.predict(['start', 'io', 'join', 'last']))

    def check_mode(self, mode, times):
        """Catches privileged code that is taken for unprivileged code."""
        self.start('coverage_modes', a=2, u=5, coverage={
            'ranges': self.ranges(), 'mode': mode})
        self.wait_done()
        self.assertMap(self.run_once(), self.predict(self.path() * times))

    def test_mode_all(self):
        self.check_mode('all', 7)

    def test_mode_kernel(self):
        self.check_mode('kernel', 2)

    def test_mode_user(self):
        self.check_mode('user', 5)

    def test_page_table(self):
        """
        Catches a page table that is not noticed, where the guest sets it and
        where a restore does.
        """
        self.start('coverage_modes', a=2, b=5, u=1,
                   coverage={'ranges': self.ranges()})
        text = self.wait_done()
        self.assertMap(self.run_once(), self.predict(self.path() * 8))
        tables = re.search('CR3 ([0-9a-f]+) ([0-9a-f]+)', text).groups()
        for table, times in (tables[0], 3), (tables[1], 5), ('1000', 0):
            self.vm.cmd('qom-set', path='/objects/cov', property='page-table',
                        value=int(table, 16))
            for _ in range(3):
                self.assertMap(self.run_once(),
                               self.predict(self.path() * times))

    def test_page_table_reset(self):
        """Catches a page table that is not there any more after a reset."""
        self.start('coverage_modes', coverage={'ranges': ['0..0xfffff']})
        text = self.wait_done()
        self.assertTrue(any(self.map[:]), 'firmware is not there')
        table = int(re.search('CR3 ([0-9a-f]+)', text).group(1), 16)
        self.vm.cmd('qom-set', path='/objects/cov', property='page-table',
                    value=table)
        self.wait_halted()
        self.map[:] = bytes(SIZE)
        self.vm.cmd('system_reset')
        self.wait_done()
        self.assertFalse(any(self.map[:]))

    def test_alias(self):
        """
        The same code at two virtual addresses. Catches translated code that is
        used for both, with the id of one.
        """
        alias = 0x10000000
        self.symbols |= {f'alias_{name}': address + alias
                         for name, address in self.symbols.items()}
        self.start('coverage_modes', a=2, alias=3, coverage={
            'ranges': self.ranges() + self.ranges(-alias)})
        self.wait_done()
        chain = self.path() * 2 + [f'alias_{b}' for b in self.path()] * 3
        self.assertMap(self.run_once(), self.predict(chain))

    def test_base(self):
        """Catches an id that is of the address, not of the code."""
        self.check_path(self.IO, base=0x123000,
                        coverage={'base': 0x123000})
        self.vm.cmd('qom-set', path='/objects/cov', property='base', value=0)
        self.assertMap(self.run_once(), bytes(SIZE))    # out of the range
        self.vm.cmd('qom-set', path='/objects/cov', property='base',
                    value=0x123000)
        self.assertMap(self.run_once(),
                       self.predict(self.path(self.IO), base=0x123000))

    # Life

    def wait(self, is_so):
        """However busy the host is"""
        end = time.monotonic() + 60
        while not is_so():
            self.assertLess(time.monotonic(), end)
            time.sleep(0.001)

    def restores(self):
        return self.vm.cmd('x-query-snapshot-device')['restores']

    def check_idle(self):
        """While the guest runs, the map stays as it is."""
        self.map[:] = bytes(SIZE)
        before = self.restores()
        self.wait(lambda: self.restores() > before)
        self.assertFalse(any(self.map[:]))

    def check_running(self, *args, **options):
        """Catches code that counts where there is no map any more."""
        self.start('coverage', *args, n=1000000000, path=self.IO, loops=10,
                   **options)
        for i in range(20):
            self.check_idle()
            # Another one's ids, which nothing of this one may have
            base = self.symbols['start'] * (i & 1)
            self.count(base=base, ranges=self.ranges(base, last='io'))
            # A counter may be 0 just now, but not always.
            edge = xxhash2(self.symbols['start'] - base) % SIZE
            self.wait(lambda: self.map[edge])
            self.vm.cmd('object-del', id='cov')
        self.check_idle()
        self.vm.cmd('object-del', id='map')

    def test_running(self):
        self.check_running()

    def test_running_two_cpus(self):
        self.check_running(cpus=2)

    def test_running_icount(self):
        self.check_running('-icount', 'shift=auto')

    def test_hotplug(self):
        """Catches a CPU that an object does not know of, or forgets."""
        self.start('coverage', '-smp',
                   '1,sockets=3,cores=1,maxcpus=3', coverage={})
        for i in 1, 2:
            self.vm.cmd('device_add', driver='qemu64-x86_64-cpu', id=f'cpu{i}',
                        socket_id=i, core_id=0, thread_id=0)
            self.vm.cmd('object-del', id='cov')
            self.count()
        self.wait_done()

    def test_command_line(self):
        """Catches an object that is made before its memory or the CPUs."""
        self.start('coverage', '-object',
                   'tcg-coverage,id=cov,memdev=map,base=0x1000,ranges=0+1,'
                   f'ranges={self.ranges(0x1000, last="last")[0]}')
        self.wait_done()
        self.assertMap(self.run_once(),
                       self.predict(self.path()[:-1], base=0x1000))

    def memory(self):
        text = Path(f'/proc/{self.vm.get_pid()}/smaps_rollup').read_text()
        jit = self.vm.cmd('human-monitor-command', command_line='info jit')
        return (int(re.search(r'^Anonymous: +(\d+)', text, re.M).group(1)),
                int(re.search(r'TB count +(\d+)', jit).group(1)))

    def test_memory(self):
        """
        Catches what restores or runs add to QEMU's memory, or to the code that
        it has translated; and a map that is taken for the guest's memory.
        """
        self.start('coverage', n=1000000000, path=self.IO, loops=10,
                   coverage={}, device='snapshot,verify=1000')
        samples = []
        for part in 0.2, 1:
            while self.restores() < self.RESTORES * part:
                time.sleep(0.1)
            self.vm.cmd('stop')
            time.sleep(1)
            samples.append(self.memory())
            self.vm.cmd('cont')
        self.log.info('KiB and TBs: %s', samples)
        self.assertEqual(samples[0][1], samples[1][1])
        self.assertLess((samples[1][0] - samples[0][0]) * 1024,
                        16 * self.RESTORES)
        info = self.vm.cmd('x-query-snapshot-device')
        self.assertGreaterEqual(info['verified'], self.RESTORES // 1000)
        self.assertEqual(info['mismatched'], 0, info['mismatches'])

    def check_restore(self, device):
        """Catches a map that is put back with the guest's memory."""
        self.start('coverage', device=device)
        self.wait_done()
        noise = os.urandom(SIZE)
        self.map[:] = noise
        self.vm.cmd('x-snapshot-device-restore', slot=0)
        self.wait_done()
        self.assertEqual(self.map[:], noise)
        # It may go, and come again.
        self.vm.cmd('object-del', id='map')
        self.vm.cmd('x-snapshot-device-restore', slot=0)
        self.wait_done()
        self.vm.cmd('object-add', qom_type='memory-backend-ram', id='map',
                    size=SIZE)
        self.count()
        self.vm.cmd('x-snapshot-device-restore', slot=0)
        self.wait_done()

    def test_restore_dirty(self):
        self.check_restore('snapshot,ram=dirty')

    def test_restore_remap(self):
        self.check_restore('snapshot,ram=remap')

    def test_migration(self):
        """Catches a map that is migrated with the machine."""
        self.start('coverage', coverage={})
        self.wait_done()
        blocks = self.vm.cmd('human-monitor-command',
                             command_line='info ramblock')
        self.log.info('%s', blocks)
        state = self.scratch_file('state')
        self.map[:] = os.urandom(SIZE)
        noise = self.map[:64]
        self.vm.cmd('stop')
        self.vm.cmd('migrate', uri=f'file:{state}')
        end = time.monotonic() + self.DEADLINE
        while self.vm.cmd('query-migrate')['status'] != 'completed':
            self.assertLess(time.monotonic(), end)
            time.sleep(0.05)
        self.assertNotIn(noise, Path(state).read_bytes())

    # Mistakes

    def refuse(self, text, **properties):
        reply = self.vm.qmp('object-add', qom_type='tcg-coverage',
                            **{'id': 'c', 'memdev': 'map', **properties})
        self.assertIn('error', reply)
        self.assertIn(text, reply['error']['desc'])

    def test_errors(self):
        self.start('coverage', '-object',
                   'memory-backend-ram,id=odd,size=12K', '-object',
                   'memory-backend-ram,id=small,size=2K')
        self.refuse('power of two', memdev='odd')
        self.refuse('power of two', memdev='small')
        self.refuse('pc.ram', memdev='pc.ram')
        self.refuse('none', memdev='none')
        self.refuse('"2..1"', ranges=['1..2', '2..1'])
        self.count()
        self.refuse('/objects/cov', memdev='odd')
        reply = self.vm.qmp('object-del', id='map')
        self.assertIn('in use', reply['error']['desc'])
        for name, value in (('mode', 'user'), ('ranges', []),
                            ('interrupts', False), ('memdev', 'odd')):
            reply = self.vm.qmp('qom-set', path='/objects/cov', property=name,
                                value=value)
            self.assertIn('cannot be changed', reply['error']['desc'])
        self.vm.cmd('object-del', id='cov')
        self.count(mode='user')

    def test_other_accelerator(self):
        self.start('coverage', accel='qtest')
        self.refuse('accel tcg')


class CoverageLinux(QemuSystemTest):
    """
    The same work of a Linux kernel, QEMU_TEST_SNAPSHOT_PASSES times. Catches
    anything of the host's that shows in the map.
    """

    PASSES = int(os.getenv('QEMU_TEST_SNAPSHOT_PASSES', '100'))

    def check(self, *args, **properties):
        """Returns in how many runs the map was the first one's, and AFL's
        stability: which share of its bytes never varied, in percent."""
        linux = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX') or
                     Path(__file__).resolve().parents[2] / 'build/linux')
        if not (linux / 'initramfs').exists():
            self.skipTest(f'no initramfs in {linux}: run scripts/linux-guest')
        self.require_accelerator('tcg')
        self.require_device('name "snapshot"')
        map_file = Path(self.scratch_file('map'))
        map_file.write_bytes(bytes(SIZE))
        self.set_machine('q35')
        self.vm.add_args('-nodefaults', '-accel', 'tcg', '-m', '256',
                         '-cpu', 'qemu64,-rdrand,-rdseed', '-rtc', 'clock=vm',
                         '-kernel', str(linux / 'vmlinuz'),
                         '-initrd', str(linux / 'initramfs'), '-append',
                         'console=ttyS0 quiet nokaslr snapshot.run=cover',
                         '-serial', f'file:{self.log_file("serial.log")}',
                         '-device', 'pvpanic', '-action', 'panic=pause',
                         '-device', 'snapshot',
                         '-object', 'memory-backend-file,id=map,share=on,'
                         f'size={SIZE},mem-path={map_file}', *args)
        self.vm.launch()
        self.vm.event_wait('GUEST_PANICKED', timeout=120)
        self.vm.cmd('object-add', qom_type='tcg-coverage', id='cov',
                    memdev='map', mode='kernel', **properties)
        same, first, varied, used = 0, None, set(), set()
        with open(map_file, 'r+b') as f:
            counts = mmap.mmap(f.fileno(), SIZE)
        for _ in range(self.PASSES):
            counts[:] = bytes(SIZE)
            self.vm.cmd('x-snapshot-device-restore', slot=0)
            if not self.vm.cmd('query-status')['running']:
                self.vm.cmd('cont')
            self.vm.event_wait('GUEST_PANICKED', timeout=120)
            got = counts[:]
            first = first or got
            same += got == first
            if got is first or got != first:
                used |= {i for i in range(SIZE) if got[i]}
                varied |= {i for i in range(SIZE) if got[i] != first[i]}
        self.assertGreater(len(used), 1000)
        stability = 100 - 100 * len(varied) / len(used)
        self.log.info('%s %s: %d runs, %d with the same map; %d bytes used, '
                      'stability %.2f %%', args, properties, self.PASSES, same,
                      len(used), stability)
        return same, stability

    def test_icount(self):
        self.assertEqual(self.check('-icount', 'shift=3,sleep=off'),
                         (self.PASSES, 100))

    def test_icount_auto(self):
        """
        How fast the clock goes is made to fit the host while it runs: only
        that it works is for sure.
        """
        self.check('-icount', 'shift=auto')

    def test_without_icount(self):
        """The guest's time is the host's: only that it works is for sure."""
        self.check(interrupts=False)


if __name__ == '__main__':
    QemuSystemTest.main()

#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/snapshot-run: programs on Linux process a
# fuzzer's inputs, saved inside their start or started anew
#
# QEMU_TEST_AFL is as in test_x86_64_snapshot_afl.py.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import re
import shutil
import subprocess
import time

from snapshot.machines import ROOT, MachinesTest, host_programs, scratch
from snapshot.programs import pack

HERE = Path(__file__).resolve().parent
TARGET = HERE / 'snapshot-program' / 'target.c'
CONTRIB = ROOT / 'contrib' / 'snapshot'
LINUX = Path(os.getenv('QEMU_TEST_SNAPSHOT_LINUX') or
             HERE.parents[1] / 'build' / 'linux')
INIT = 'console=ttyS0 panic=-1 no_timer_check quiet snapshot.run='


def compiled(name, *args, cc='gcc', source=TARGET, env=None):
    """The path of a program, or None and why it is none"""
    path = Path(scratch().name, name)
    if not path.exists():
        done = subprocess.run([cc, '-O1', '-g', '-w', '-o', path, source,
                               *args], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=env)
        if done.returncode:
            return None, done.stdout[-2000:]
    return path, ''


class ProgramTest(MachinesTest):

    def setUp(self):
        super().setUp()
        for file in 'vmlinuz', 'initramfs':
            if not (LINUX / file).exists():
                self.skipTest(f'no {file} in {LINUX}: scripts/linux-guest')
        for tool in 'gcc', 'cpio':
            if not shutil.which(tool):
                self.skipTest(f'no {tool}: apt-get install {tool}')

    def write(self, name, text):
        path = Path(scratch().name, name)
        path.write_text(text, encoding='ascii')
        return path

    def build(self, name, *args, cc='gcc', package='gcc', **rest):
        if not shutil.which(cc):
            self.skipTest(f'no {cc}: apt-get install {package}')
        path, why = compiled(name, *args, cc=cc, **rest)
        if 'libclang_rt' in why:
            self.skipTest('no runtime of clang\'s: apt-get install '
                          'libclang-rt-dev')
        self.assertTrue(path, why)
        return path

    def dynamic(self):
        # glibc loads it for pthread_exit(), where ldd does not see it.
        return self.build('dynamic', '-Wl,--no-as-needed,-lgcc_s')

    def object(self):
        """snapshot-cov.o"""
        path = Path(scratch().name, 'parts')
        subprocess.run(['make', '-s', '-C', CONTRIB, f'O={path}',
                        f'{path}/snapshot-cov.o'], check=True)
        return path / 'snapshot-cov.o'

    def pack(self, *programs):
        initramfs = self.scratch_file('initramfs')
        pack(LINUX / 'initramfs', programs, initramfs)
        return initramfs

    def machine(self, programs, command, *lines, device='verify=on',
                options=''):
        self.path = self.describe(
            f'qemu = {self.qemu_bin}', 'boot = 300', 'timeout = 20000',
            f'device = {device}', *lines, '-accel tcg', '-m 128',
            f'-kernel {LINUX}/vmlinuz', f'-initrd {self.pack(*programs)}',
            '-device pvpanic',
            f'-append {options}{INIT}{command.replace(" ", ",")}')
        return self.lib.Machine(self.path)

    def query(self):
        from qemu.qmp.legacy import QEMUMonitorProtocol
        directory = self.lib.status(self.path).directory.decode()
        monitor = QEMUMonitorProtocol(directory + '/qmp')
        monitor.connect()
        found = monitor.cmd('x-query-snapshot-device')
        monitor.close()
        return found

    def check_verified(self):
        """Nothing has differed after any restore."""
        found = self.query()
        self.assertGreater(found['verified'], 0)
        self.assertEqual(found['mismatched'], 0, found['mismatches'])

    def check_ok(self, vm, data):
        run = vm.run(data)
        self.assertEqual((run.result, run.cause, run.text),
                         (self.lib.OK, self.lib.GUEST, ''), data[:8])
        return run

    def edges(self, vm, data):
        run = self.check_ok(vm, data)
        return {i: n for i, n in enumerate(run.coverage) if n}

    def check_end(self, vm, data, result, words):
        run = vm.run(data)
        self.assertEqual((run.result, run.cause), (result, self.lib.GUEST),
                         (data[:8], run.text))
        self.assertRegex(run.text, words, data[:8])
        return run


class Ends(ProgramTest):
    """
    target.c, which ends in each way. Catches an end that is taken for another,
    or for a hang; an input that is another run's; and what a run leaves behind:
    the target looks for that when it starts, and exits with 99.
    """

    GOOD = (b'', b'r\0', b'r\1', b'e\5', b'_\6', b'-\7', b'q\7', b'y\7', b't',
            b'm', b'f_', b'fe', b'fq', b'fc', b'x', b'c', b'C', b'w', b'h',
            b'l' + bytes(8191), b'w' + bytes(999999))
    BAD = ((b'A', r'^signal 6 .*\n(.*\n)*about to abort\n$'),
           (b'S', r'^signal 11 (.|\n)*at (0x)?1230'),
           (b'F', r'^signal 8 '), (b'I', r'^signal 4 '),
           (b'K', r'^signal 9 '), (b'R', r'^signal 11 '),
           (b'T', r'^signal 11 (.|\n)*1230'), (b'ge', r'^signal 11 '),
           (b'g_', r'^signal 11 '), (b'gq', r'^signal 11 '),
           (b'gc', r'^signal 11 '),
           (b'X', r'^signal 11 (.|\n)*1240'), (b'B', r'^signal 7 '),
           (b'r\x63', r'^exit status 99\n((tsc|clocksource): .*\n)*$'),
           (b'e\x63', '^exit status 99'),
           (b'_\x63', '^exit status 99'), (b'q\x63', '^exit status 99'),
           (b'y\x63', '^exit status 99'))

    def check_all(self, programs, command, says, shim):
        with self.machine(programs, command) as vm:
            self.assertIn(says, self.lib.console(vm.directory))
            self.assertEqual(vm.input_size, 1000000)
            for _ in range(2):
                for data in self.GOOD:
                    self.check_ok(vm, data)
                for data, words in self.BAD:
                    self.check_end(vm, data, self.lib.CRASH, words)
            if shim:
                for data, where in ((b'S', '1230'), (b'B', '20000123'),
                                    (b'F', '[0-9a-f]+'), (b'T', '1230'),
                                    (b'R', '7f[0-9a-f]+')):
                    self.check_end(vm, data, self.lib.CRASH,
                                   rf'^signal \d+ \(.*\) at 0x{where}\n')
            run = vm.run(b'H', self.lib.Limits(host_ns=300000000))
            self.assertEqual((run.result, run.cause),
                             (self.lib.HANG, self.lib.HOST_TIME))
            self.check_ok(vm, b'1')
            self.check_verified()

    def test_shim(self):
        self.check_all([self.dynamic()],
                       'snapshot-run -x 99 -s 1000000 -- /opt/dynamic',
                       'saves inside its start', True)

    def test_shim_file(self):
        self.check_all([self.dynamic()], 'snapshot-run -x 99 '
                       '-s 1000000 -- /opt/dynamic --file=@@',
                       'saves inside its start', True)

    def test_whole(self):
        self.check_all([self.build('static', '-static')],
                       'snapshot-run -x 99 -s 1000000 -- /opt/static',
                       'is started in each run', False)

    def test_whole_file(self):
        self.check_all([self.dynamic()], 'snapshot-run -w -x 99 -f '
                       '/tmp/input -s 1000000 -- /opt/dynamic --file=@@',
                       'is started in each run', False)


class Refused(ProgramTest):
    """Catches what is wrong and waited for, or not told on the console."""

    def test_refused(self):
        static = self.build('static', '-static')
        unready = self.build('unready', source=self.write('unready.c', '''
#include <stdio.h>
#include <unistd.h>
static void __attribute__((constructor)) early(void)
{
    fprintf(stderr, "it is too early");
    _exit(7);
}
int main(void) { return 0; }
'''))
        for command, words in (
                ('-- /nowhere', 'cannot execute "/nowhere": No such file'),
                ('-- /opt', 'cannot execute "/opt": Permission denied'),
                ('-p -- /opt/static', 'cannot save inside /opt/static, for it '
                 'is not dynamically linked'),
                ('-- /opt/unready', r'/opt/unready has ended before it was '
                 r'READY, with status 7\s+it is too early'),
                ('-s 10000000 -- /opt/static', 'longer than the channel'),
                ('-s nine -- /opt/static', 'nine is not a number'),
                ('-f /proc/x -- /opt/static', 'cannot create /proc/x')):
            with self.subTest(command):
                with self.assertRaises(self.lib.Failure) as caught:
                    self.machine([static, unready], f'snapshot-run {command}')
                self.assertRegex(str(caught.exception), words)


class Speed(ProgramTest):

    MIXED = (b'1', b'', b'w' + bytes(5000), b'fe', b't', b'2', b'h', b'e\1',
             b'y\1', b'l\x20')

    def test_soak(self):
        """2000 runs. Catches one that leaves something in QEMU, or differs."""
        program = self.build('guard', '-fsanitize-coverage=trace-pc-guard',
                             self.object(), cc='clang', package='clang')
        runs = 20000 if os.getenv('FULL') else 2000
        with self.machine([program], 'snapshot-run -- /opt/guard') as vm:
            qemu = self.lib.status(self.path).qemu
            maps, size = {}, 0
            for i in range(runs):
                data = self.MIXED[i % len(self.MIXED)]
                found = self.check_ok(vm, data).coverage
                self.assertEqual(maps.setdefault(data, found), found, data)
                if i == runs // 4:
                    size = self.resident(qemu)
            grown = self.resident(qemu) - size
            print(f'# {grown} KiB more after {runs} runs')
            self.assertLess(grown, 4096)
            self.check_verified()

    def resident(self, pid):
        """KiB"""
        status = Path(f'/proc/{pid}/status').read_text(encoding='ascii')
        return int(re.search(r'VmRSS:\s+(\d+)', status)[1])

    def test_speed(self):
        """
        Tells what it is worth to save inside the start. Catches a shim that is
        no faster than an exec.
        """
        rates = {}
        seed = self.scratch_file('seed')
        Path(seed).write_bytes(b'1')
        for way in '-p', '-w':
            with self.machine([self.dynamic()], f'snapshot-run {way} -- '
                              '/opt/dynamic', device='ram=dirty'):
                pass
            output = subprocess.check_output(
                [host_programs() / 'snapshot-vm', 'measure', self.path, seed,
                 '3'], text=True)
            rates[way] = int(output.split()[0])
            if way == '-p':
                pages = self.query()['last-pages']
        print(f'# inside the start: {rates["-p"]} runs/s, '
              f'started anew: {rates["-w"]}; {pages} pages')
        self.assertGreater(rates['-p'], 2 * rates['-w'])


class Coverage(ProgramTest):
    """
    Maps that the target fills. Catches one that is another run's, or has what
    was not executed, or lacks what was; and one that depends on the machine.
    """

    # Loops of 255, 256 and 257 rounds
    ROUND = (b'l\xff', b'l\xffx', b'l\xffxx')

    def check_maps(self, programs, command, most=None, size=65536):
        """@most: how many edges there are, if each has a count of its own"""
        found = []
        for device in 'verify=on', 'ram=dirty':
            with self.machine(programs, command, device=device) as vm:
                self.assertEqual(vm.coverage_size, size)
                found.append(self.maps(vm))
                if device == 'verify=on':
                    self.check_verified()
        self.assertEqual(*found)
        maps = found[0]
        one, two, three = (set(maps[data]) for data in (b'1', b'2', b'3'))
        # Each is a function's and its case's. The third has both, at once.
        self.assertTrue(one - two)
        self.assertTrue(two - one)
        self.assertTrue(one & two)
        self.assertTrue(three - one and three - two)
        # A loop's rounds are counted, and nothing else differs.
        few, many = maps[b'l\x05'], maps[b'l\x09']
        self.assertEqual(set(few), set(many))
        rounds = {i for i in few if few[i] != many[i]}
        self.assertTrue(rounds)
        for i in rounds:
            self.assertEqual(many[i] - few[i], 4)
        if 'static' not in command:
            # Rounds before main() are not of the run.
            self.assertFalse(rounds & set(maps[b'1']))
        # 0 says "never", whatever the count.
        for data in self.ROUND:
            self.assertEqual(set(few), set(maps[data]))
        if most is not None:
            for counts in maps.values():
                self.assertLess(max(counts), most)

    def maps(self, vm):
        maps = {}
        for data in (b'1', b'2', b'3', b'l\x05', b'l\x09', b'c', b'1x',
                     b'', b'1', *self.ROUND) * 2:
            found = self.edges(vm, data)
            self.assertEqual(maps.setdefault(data, found), found, data)
            self.check_end(vm, b'S', self.lib.CRASH, '^signal 11')
        # A crash has a map, too, and a child counts in its parent's.
        self.assertTrue(any(vm.run(b'S').coverage))
        child = self.edges(vm, b'fe')
        self.assertGreater(len(child), len(maps[b'']))
        return maps

    def guards(self, program):
        """How many edges clang has numbered"""
        output = subprocess.check_output(['readelf', '-SW', program], text=True)
        size = re.search(r' __sancov_guards +\S+ +\S+ +\S+ +(\S+)', output)
        return int(size[1], 16) // 4

    def test_guard(self):
        program = self.build('guard', '-fsanitize-coverage=trace-pc-guard',
                             self.object(), cc='clang', package='clang')
        self.check_maps([program], 'snapshot-run -- /opt/guard',
                        self.guards(program))

    def test_guard_static(self):
        # clang's runtime crashes in static programs, and is not needed.
        program = self.build('guard-static', '-static',
                             '-fno-sanitize-link-runtime',
                             '-fsanitize-coverage=trace-pc-guard',
                             self.object(), cc='clang', package='clang')
        self.check_maps([program], 'snapshot-run -m 4096 -- /opt/guard-static',
                        self.guards(program), size=4096)

    def test_trace_pc(self):
        self.check_maps([self.build('pc', '-fsanitize-coverage=trace-pc',
                                    self.object())],
                        'snapshot-run -- /opt/pc')

    def test_trace_pc_static(self):
        self.check_maps([self.build('pc-static', '-static',
                                    '-fsanitize-coverage=trace-pc',
                                    self.object())],
                        'snapshot-run -- /opt/pc-static')

    def test_library(self):
        """The program counts nothing, its library does."""
        directory = scratch().name
        library = self.build(
            'libtarget.so', '-shared', '-fPIC', '-Dmain=target_main',
            '-fsanitize-coverage=trace-pc-guard', cc='clang', package='clang')
        source = self.write('main.c', 'int target_main(int, char **);\n'
                            'int main(int argc, char **argv)\n'
                            '{ return target_main(argc, argv); }\n')
        program = self.build('uses-library', f'-L{directory}', '-ltarget',
                             '-Wl,-rpath,/opt',
                             '-Wl,--allow-shlib-undefined', source=source)
        self.check_maps([program, library],
                        'snapshot-run -- /opt/uses-library',
                        self.guards(library))

    def test_small(self):
        """Catches a count outside a map that is too small for all edges."""
        program = self.build('guard', '-fsanitize-coverage=trace-pc-guard',
                             self.object(), cc='clang', package='clang')
        with self.machine([program], 'snapshot-run -- /opt/guard') as vm:
            all_edges = self.edges(vm, b'1')
        with self.machine([program], 'snapshot-run -v -m 8 -- /opt/guard') \
                as vm:
            self.assertRegex(self.lib.console(vm.directory),
                             r'edges share 8 counts: snapshot-run -m \d+')
            self.assertEqual(vm.coverage_size, 8)
            self.assertEqual(sum(self.edges(vm, b'1').values()),
                             sum(all_edges.values()))


class Sanitizers(ProgramTest):
    """Catches a report that is lost, cut, or taken for a crash."""

    def check(self, program, command, cases):
        with self.machine([program], command) as vm:
            for _ in range(2):
                for data, words in cases:
                    self.check_end(vm, data, self.lib.SANITIZER, words)
                    self.check_ok(vm, b'1')
            self.check_end(vm, b'A', self.lib.CRASH, '^signal 6 ')
            self.check_ok(vm, b'f_')
            self.check_ok(vm, b'r\1')
            self.check_verified()

    OVERFLOW = r'ERROR: AddressSanitizer: heap-buffer-overflow(.|\n)*' \
        r'WRITE of size 1(.|\n)*#0 '
    ADDRESS = ((b'o', OVERFLOW), (b'O', OVERFLOW),
               (b'S', r'AddressSanitizer: SEGV on unknown address 0x0*1230'),
               (b'R', r'AddressSanitizer: stack-overflow'))

    def test_address(self):
        """gcc's is a library, clang's a part of the program."""
        self.check(self.build('asan', '-fsanitize=address'),
                   'snapshot-run -- /opt/asan', self.ADDRESS)

    def test_address_clang(self):
        self.check(self.build('asan-clang', '-fsanitize=address', cc='clang',
                              package='clang'),
                   'snapshot-run -- /opt/asan-clang', self.ADDRESS)

    def test_address_whole(self):
        self.check(self.build('asan-clang', '-fsanitize=address', cc='clang',
                              package='clang'),
                   'snapshot-run -w -- /opt/asan-clang', self.ADDRESS)

    def test_leak(self):
        self.check(self.build('asan-clang', '-fsanitize=address', cc='clang',
                              package='clang'),
                   'env ASAN_OPTIONS=detect_leaks=1 snapshot-run -- '
                   '/opt/asan-clang',
                   ((b'k', r'LeakSanitizer: detected memory leaks(.|\n)*1000'),
                    (b'o', self.OVERFLOW)))

    def test_undefined(self):
        self.check(self.build('ubsan', '-fsanitize=undefined'),
                   'snapshot-run -- /opt/ubsan',
                   ((b'u', r'runtime error: signed integer overflow'),
                    (b'F', r'runtime error: division by zero')))


class Afl(ProgramTest):
    """Targets of AFL++'s compilers, as they are"""

    def compilers(self):
        """Each that works here: its name, command and environment"""
        named = os.environ.get('QEMU_TEST_AFL')
        found = shutil.which('afl-cc')
        paths = [Path(path) for path in named.split(':')] if named else \
            [Path(found).parent] if found else []
        for path in paths:
            env = dict(os.environ, AFL_QUIET='1')
            if (path.parent / 'root').exists():
                env['AFL_PATH'] = str(path.parent / 'root/usr/lib/afl')
            for mode in 'LLVM', 'GCC':
                yield (f'afl-{path.parent.name}-{mode.lower()}',
                       path / 'afl-cc', dict(env, AFL_CC_COMPILER=mode))

    def check_target(self, program, command):
        with self.machine([program], command) as vm:
            size = vm.coverage_size
            maps = {}
            for data in (b'1', b'2', b'3', b'l\5', b'l\x09', b'') * 3:
                counts = self.edges(vm, data)
                self.assertEqual(maps.setdefault(data, counts), counts, data)
            self.assertGreater(len(maps[b'1']), 3)
            self.assertTrue(set(maps[b'1']) - set(maps[b'2']))
            self.assertTrue(set(maps[b'2']) - set(maps[b'1']))
            # Its compiler unrolls loops.
            self.assertNotEqual(maps[b'l\5'], maps[b'l\x09'])
            self.check_end(vm, b'S', self.lib.CRASH, '^signal 11')
            self.check_ok(vm, b'f_')
            self.check_verified()
            return size

    def check_each(self, suffix, *args, **source):
        worked = []
        for name, cc, env in self.compilers():
            name += suffix
            path, why = compiled(name, *args, cc=cc, env=env, **source)
            if not path:
                self.log.info('%s: %s', name, why)
                continue
            worked.append(name)
            for way in '', '-w ':
                with self.subTest(name, way=way):
                    self.check_target(path, f'snapshot-run {way}-- /opt/{name}')
        if not worked:
            self.skipTest('no afl-cc that compiles this: apt-get install afl++')
        self.log.info('%s', worked)

    def test_afl(self):
        """
        Catches a fork server that starts, a map that the target does not find,
        and one of another size.
        """
        self.check_each('')

    def test_persistent(self):
        """Catches a loop that waits for AFL++, or is run through twice."""
        self.check_each('-persistent', f'-DPROGRAM="{TARGET}"',
                        source=TARGET.with_name('persistent.c'))

    def test_large_map(self):
        """
        A target of more than 65536 edges, as afl-cc makes it: it tells how
        many. Catches a map that is too small for it, and one that is cut.
        """
        source = self.write('large.c', '''
#include <stdio.h>
#include <stdlib.h>
#include <sys/shm.h>
int main(void)
{
    if (getenv("AFL_DUMP_MAP_SIZE")) {
        printf("100003\\n");
        return 1;
    }
    if (atoi(getenv("AFL_MAP_SIZE")) < 100003) {
        abort();
    }
    char *map = shmat(atoi(getenv("__AFL_SHM_ID")), NULL, 0);
    map[0] = 1;
    map[100002] = getchar();
    return 0;
}
''')
        program = self.build('large', source=source)
        for way in '', '-w ', '-m 200000 ':
            with self.machine([program], f'snapshot-run {way}-- /opt/large') \
                    as vm:
                self.assertEqual(vm.coverage_size,
                                 200000 if '-m' in way else 100032)
                found = self.check_ok(vm, b'x').coverage
                self.assertEqual({i: n for i, n in enumerate(found) if n},
                                 {0: 1, 100002: ord('x')})
        with self.assertRaisesRegex(self.lib.Failure, '/opt/large needs a map '
                                    'of 100003 bytes: -m 65536 is less'):
            self.machine([program], 'snapshot-run -m 65536 -- /opt/large')


class Kernel(ProgramTest):

    def test_oops(self):
        """
        snapshot-linux/oops.c. Catches an oops that is no crash, one whose words
        are lost, and a kernel that is not as before.
        """
        lib = self.lib
        bad = (0x1234).to_bytes(8, 'little') * 8
        with self.machine([], 'oops', options='nopti oops=panic ') as vm:
            for _ in range(3):
                self.check_ok(vm, b'')
                run = vm.run(bad)
                # panic=-1 resets where no driver of pvpanic's is.
                self.assertEqual(run.result, lib.CRASH)
                self.assertIn(run.cause, (lib.PANIC, lib.RESET))
            self.wait_until_console(vm, r'BUG: .*1234(.|\n)*'
                                    r'Kernel panic - not syncing: Fatal exc')
            self.check_ok(vm, b'')
            self.check_verified()
        # So that it is the option which makes it one
        with self.machine([], 'oops', options='nopti ') as vm:
            run = vm.run(bad)
            self.assertEqual((run.result, run.cause),
                             (lib.INVALID, lib.GUEST))

    def test_netlink(self):
        """
        What the README shows: messages to the kernel, which QEMU counts edges
        of. Catches a message that does not reach the kernel.
        """
        source = TARGET.with_name('netlink.c')
        program = self.build('netlink', source=source)
        # RTM_GETLINK and RTM_NEWLINK, which makes a bridge or nothing
        header = (0, 18, 0x301, 1, 0)
        ask = bytes([0, 32]) + b''.join(
            n.to_bytes(size, 'little')
            for n, size in zip((32, *header[1:]), (4, 2, 2, 4, 4))) + bytes(16)
        with self.machine([program], 'snapshot-run -- /opt/netlink',
                          'coverage = tcg,mode=kernel', device='ram=dirty',
                          options='oops=panic nokaslr ') as vm:
            maps = {}
            for data in (b'', ask, bytes([0, 32]) + bytes(32), ask + ask,
                         bytes([15, 200]) + bytes(200)) * 3:
                found = set(self.edges(vm, data))
                maps[data] = maps.get(data, found) & found
            self.assertGreater(len(maps[ask]), len(maps[b'']) + 100)
            self.assertTrue(maps[ask] - maps[bytes([0, 32]) + bytes(32)])

    def wait_until_console(self, vm, words):
        end = time.monotonic() + 15
        while not re.search(words, self.lib.console(vm.directory)):
            self.assertLess(time.monotonic(), end,
                            self.lib.console(vm.directory)[-2000:])
            time.sleep(0.05)


if __name__ == '__main__':
    MachinesTest.main()

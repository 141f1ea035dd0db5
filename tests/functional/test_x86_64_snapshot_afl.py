#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/host/afl-snapshot with AFL++
#
# QEMU_TEST_AFL names directories with its tools, colons between; scripts/check
# has several versions. Else they are those in PATH.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import time

from snapshot.machines import MachinesTest, host_programs


HERE = Path(__file__).resolve().parent


def tools():
    """The directories of AFL++'s tools"""
    named = os.environ.get('QEMU_TEST_AFL')
    if named:
        return [Path(path) for path in named.split(':')]
    found = shutil.which('afl-fuzz')
    return [Path(found).parent] if found else []


class Afl(MachinesTest):
    """Each version does all with one machine."""

    # How a run ends, and the signal that AFL++ is told
    SIGNALS = {b'C': signal.SIGSEGV, b'A': signal.SIGABRT,
               b'P': signal.SIGBUS, b'T': signal.SIGILL, b'R': signal.SIGILL,
               b'O': signal.SIGFPE}
    ENV = {'AFL_NO_UI': '1', 'AFL_SKIP_CPUFREQ': '1',
           'AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES': '1',
           # Others are bound to CPUs here, too; what we make is temporary.
           'AFL_NO_AFFINITY': '1', 'AFL_ALLOW_TMP': '1'}

    def setUp(self):
        super().setUp()
        if not tools():
            self.skipTest('no AFL++: apt-get install afl++')
        self.bridge = host_programs() / 'afl-snapshot'
        self.env = {**os.environ, **self.ENV}
        self.env.pop('AFL_MAP_SIZE', None)

    def each_version(self):
        for path in tools():
            self.log.info('%s', path)
            self.afl = path
            self.path = self.describe_guest(options='stop=0')
            with self.lib.Machine(self.path, flags=self.lib.FRESH):
                self.qemu = self.lib.status(self.path).qemu
            self.work = Path(self.scratch_file('work'))
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            yield path

    def command(self, tool, *args):
        return [self.afl / tool, *args, '--', self.bridge, self.path]

    def call(self, tool, *args, stdin=subprocess.DEVNULL, timeout=60):
        done = subprocess.run(self.command(tool, *args), env=self.env,
                              text=True, errors='replace', stdin=stdin,
                              stdout=subprocess.PIPE, timeout=timeout,
                              stderr=subprocess.STDOUT)
        return done.stdout[-3000:]

    def inputs(self, **files):
        path = self.work / 'in'
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        return path

    def bridge_log(self):
        return (Path(self.lib.status(self.path).directory.decode()) /
                'log').read_text(errors='replace')

    def check_one_machine(self):
        """Catches a tool that has booted one of its own."""
        self.assertEqual(self.lib.status(self.path).qemu, self.qemu)
        self.assertIsNone(self.lib.status(self.path, 1))

    def wait_for_nobody(self, instance=0):
        end = time.monotonic() + 10
        while self.lib.status(self.path, instance).user:
            self.assertLess(time.monotonic(), end, 'the bridge stays')
            time.sleep(0.01)

    def processes(self):
        """Of the bridge, also those that only wait to be killed"""
        found = subprocess.run(['pgrep', '-f', f'^{self.bridge} '],
                               stdout=subprocess.PIPE, text=True)
        return found.stdout.split()

    def showmap(self, data, *args):
        """What AFL++ sees of one input: map, and its last words"""
        file = self.work / 'input'
        out = self.work / 'map'
        file.write_bytes(data)
        out.unlink(missing_ok=True)
        with open(file, 'rb') as stdin:
            said = self.call('afl-showmap', '-r', '-o', out, *args,
                             stdin=stdin)
        self.assertTrue(out.exists(), said)
        return dict(tuple(map(int, line.split(':')))
                    for line in out.read_text().split()), said

    def test_tools(self):
        """Catches a tool that waits, boots, or sees another coverage."""
        for _ in self.each_version():
            with self.lib.Machine(self.path) as vm:
                wanted = {i: n for i, n in enumerate(vm.run(b'FUx').coverage)
                          if n}
            self.assertEqual(len(wanted), 3)
            self.assertEqual(self.showmap(b'FUx')[0], wanted)
            crash, said = self.showmap(b'FUZ!C')
            self.assertGreater(len(crash), len(wanted))
            self.assertRegex(said, r'killed by signal 11|crashed')
            with open(self.work / 'input', 'wb+') as stdin:
                stdin.write(b'FUZ!H')
                stdin.seek(0)
                said = self.call('afl-showmap', '-t', '200', '-o', '/dev/null',
                                 stdin=stdin)
            self.assertRegex(said, 'timed o')
            self.assertEqual(self.showmap(b'FUx')[0], wanted)

            seeds = self.inputs(a=b'FUx', b=b'FUxx', c=b'zz', d=b'FUZ?')
            out = self.work / 'min'
            said = self.call('afl-cmin', '-i', seeds, '-o', out)
            self.assertTrue(out.exists(), said)
            self.assertEqual(sorted(f.read_bytes()[:3]
                                    for f in out.iterdir()),
                             sorted({b'FUZ'}), said)

            long, short = self.work / 'long', self.work / 'short'
            long.write_bytes(b'FUZ!Cabcdefghijklmn')
            said = self.call('afl-tmin', '-i', long, '-o', short)
            self.assertEqual(short.read_bytes(), b'FUZ!C', said)
            self.check_one_machine()

    def test_fuzz(self):
        """
        Catches crashes and hangs that AFL++ does not tell apart, and files
        whose name does not tell how their run ended.
        """
        for _ in self.each_version():
            seeds = self.inputs(seed=b'FUZ!x')
            out = self.work / 'out'
            words = self.work / 'words'
            words.write_text('\n'.join(f'"FUZ!{c}"' for c in 'CAPTROH'))
            said = self.call('afl-fuzz', '-i', seeds, '-o', out, '-t', '100',
                             '-x', words, '-V', '10', timeout=100)
            stats = (out / 'default' / 'fuzzer_stats').read_text()
            found = {'crashes': [], 'hangs': []}
            for kind, files in found.items():
                files += (out / 'default' / kind).glob('id*')
            with self.lib.Machine(self.path) as vm:
                for file in found['crashes']:
                    run = vm.run(file.read_bytes())
                    letter = file.read_bytes()[4:5]
                    self.assertEqual(run.result, self.lib.SANITIZER if letter
                                     == b'A' else self.lib.CRASH, file)
                    self.assertIn(f'sig:{self.SIGNALS[letter]:02}', file.name)
                for file in found['hangs']:
                    run = vm.run(file.read_bytes())
                    self.assertEqual(run.result, self.lib.HANG, file)
            self.assertGreater(len(found['crashes']), 2, said)
            self.assertGreater(len(found['hangs']), 0, said)
            self.assertRegex(stats, r'stability +: 100\.00%')
            self.assertRegex(self.bridge_log(), 'crash.*the planted crash')
            speed = float(re.search(r'execs_per_sec +: ([\d.]+)', stats)[1])
            print(f'# {self.afl}: {speed} runs/s')
            self.assertGreater(speed, 100)
            self.wait_for_nobody()
            self.check_one_machine()

    def test_parallel(self):
        """Catches two that share a machine, or wait for one."""
        for _ in self.each_version():
            seeds, out = self.inputs(seed=b'FU'), self.work / 'out'
            both = [subprocess.Popen(
                self.command('afl-fuzz', '-i', seeds, '-o', out, '-V', '6',
                             role, name), env=self.env,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for role, name in (('-M', 'a'), ('-S', 'b'))]
            for process in both:
                process.wait(timeout=100)
            for name in 'ab':
                stats = (out / name / 'fuzzer_stats').read_text()
                runs = int(re.search(r'execs_done +: (\d+)', stats)[1])
                self.assertGreater(runs, 100)
            for instance in 0, 1:
                self.wait_for_nobody(instance)
            self.assertNotEqual(self.lib.status(self.path, 1).qemu, self.qemu)
            self.lib.stop(self.path)
            shutil.rmtree(self.lib.status(self.path, 1).directory)

    def test_ends(self):
        """Catches a process, or a run, that outlives its fuzzer."""
        for _ in self.each_version():
            seeds = self.inputs(seed=b'FUZ!x')
            for how in signal.SIGINT, signal.SIGTERM, signal.SIGKILL:
                out = self.work / how.name
                process = subprocess.Popen(
                    self.command('afl-fuzz', '-i', seeds, '-o', out, '-t',
                                 '1000'), env=self.env,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                end = time.monotonic() + 30
                while not (out / 'default' / 'fuzzer_stats').exists():
                    self.assertLess(time.monotonic(), end)
                    time.sleep(0.1)
                time.sleep(1)
                process.send_signal(how)
                process.wait(timeout=20)
                self.wait_for_nobody()
                end = time.monotonic() + 5
                while self.processes():
                    self.assertLess(time.monotonic(), end, how)
                    time.sleep(0.01)
                with self.lib.Machine(self.path) as vm:
                    self.assertEqual(vm.run(b'FUZ!x').result, self.lib.OK)
                self.check_one_machine()

    def test_qemu_dies(self):
        """Catches a fault of QEMU's that ends the campaign, or is hidden."""
        for _ in self.each_version():
            seeds, out = self.inputs(seed=b'F'), self.work / 'out'
            process = subprocess.Popen(
                self.command('afl-fuzz', '-i', seeds, '-o', out, '-V', '8'),
                env=self.env, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
            time.sleep(5)
            os.kill(self.lib.status(self.path).qemu, signal.SIGKILL)
            self.assertEqual(process.wait(timeout=60), 0)
            self.assertRegex(self.bridge_log(), 'QEMU was ended by signal 9.*')
            self.assertNotEqual(self.lib.status(self.path).qemu, 0)
            self.assertNotEqual(self.lib.status(self.path).qemu, self.qemu)

    def speed(self, target, seconds=6):
        """Runs a second of one of afl-fuzz's campaigns, bound to a CPU"""
        out = self.work / 'speed'
        cpu = min(os.sched_getaffinity(0))
        done = subprocess.run(
            ['taskset', '-c', str(cpu), self.afl / 'afl-fuzz', '-i',
             self.work / 'in', '-o', out, '-V', str(seconds), '--', *target],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors='replace', timeout=100)
        stats = out / 'default' / 'fuzzer_stats'
        self.assertTrue(stats.exists(), done.stdout[-3000:])
        stats = stats.read_text()
        shutil.rmtree(out)
        return float(re.search(r'execs_per_sec +: ([\d.]+)', stats)[1])

    def test_speed(self):
        """
        Tells the speed beside that of AFL++'s native fork server, of the same
        source. Catches a loop that is slower than to start a process.
        """
        native = self.scratch_file('native')
        subprocess.run(['gcc', '-O2', '-Wall', '-Werror', '-I',
                        HERE / 'snapshot', '-o', native,
                        HERE / 'snapshot-host' / 'native.c'], check=True)
        for _ in self.each_version():
            self.inputs(seed=b'xx')
            machine = self.speed([self.bridge, self.path])
            process = self.speed([native])
            print(f'# {self.afl}: {machine:.0f} runs/s, native fork server '
                  f'{process:.0f}/s: {machine / process:.1f}')
            self.assertGreater(machine, process)

    def test_without_fuzzer(self):
        """One run, which ends the program as it ended"""
        self.path = self.describe_guest('timeout = 200')
        for data, status in ((b'FUZ?', 0), (b'FUZ!C', -signal.SIGSEGV),
                             (b'FUZ!P', -signal.SIGBUS),
                             (b'FUZ!H', -signal.SIGALRM), (b'FUZ!I', 1)):
            file = Path(self.scratch_file('input'))
            file.write_bytes(data)
            for args, stdin in (([file], None), ([], open(file, 'rb'))):
                done = subprocess.run([self.bridge, self.path, *args],
                                      stdin=stdin, text=True,
                                      stderr=subprocess.PIPE)
                self.assertEqual(done.returncode, status, done.stderr)
                self.assertIn(f'input of {len(data)} bytes', done.stderr)
                if stdin:
                    stdin.close()
        self.assertEqual(subprocess.run([self.bridge, '--stop',
                                         self.path]).returncode, 0)
        self.assertEqual(self.lib.status(self.path).daemon, 0)


if __name__ == '__main__':
    MachinesTest.main()

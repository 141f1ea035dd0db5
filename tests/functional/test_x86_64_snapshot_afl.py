#!/usr/bin/env python3
#
# Functional test of contrib/snapshot/host/afl-snapshot with AFL++
#
# QEMU_TEST_AFL names directories with its tools, colons between; scripts/check
# has several versions. Else they are those in PATH.
#
# SPDX-License-Identifier: GPL-2.0-or-later

from multiprocessing.shared_memory import SharedMemory
import os
from pathlib import Path
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import time

from snapshot.hosts import monitor
from snapshot.machines import MachinesTest, host_programs


HERE = Path(__file__).resolve().parent


def tools():
    """The directories of AFL++'s tools"""
    named = os.environ.get('QEMU_TEST_AFL')
    if named:
        return [Path(path) for path in named.split(':')]
    found = shutil.which('afl-fuzz')
    return [Path(found).parent] if found else []


class Fuzzer:
    """What AFL++ says to its target, at a moment that a test chooses"""

    def __init__(self, command, scratch):
        self.file = Path(scratch)
        self.map = SharedMemory(create=True, size=65536)
        to_target, self.control = os.pipe()
        self.status, from_target = os.pipe()

        def prepare():
            os.dup2(to_target, 198)
            os.dup2(from_target, 199)
        self.process = subprocess.Popen(
            [*command, self.file], preexec_fn=prepare, close_fds=False,
            env={**os.environ, '__AFL_SHM_ID': '/' + self.map.name},
            stderr=subprocess.DEVNULL)
        os.close(to_target)
        os.close(from_target)
        self.timed_out = 0
        assert self.read() & 0x80000001 == 0x80000001

    def readable(self, seconds):
        return bool(select.select([self.status], [], [], seconds)[0])

    def read(self):
        assert self.readable(30), 'the target does not answer'
        return struct.unpack('=I', os.read(self.status, 4))[0]

    def begin(self, data):
        """Returns: the process that is killed if the run takes too long"""
        self.file.write_bytes(data)
        os.write(self.control, struct.pack('=I', self.timed_out))
        self.timed_out = 0
        return self.read()

    def kill(self, pid, how=signal.SIGKILL):
        os.kill(pid, how)
        self.timed_out = 1

    def close(self):
        os.close(self.control)
        os.close(self.status)
        self.process.wait(timeout=20)
        self.map.close()
        self.map.unlink()


class Server(MachinesTest):
    """The fork server's side, without AFL++"""

    def setUp(self):
        super().setUp()
        if not os.access('/dev/shm', os.W_OK):
            self.skipTest('needs a writable /dev/shm')

    def fuzzer(self, *options, before=()):
        self.path = self.describe_guest(*options)
        with self.lib.Machine(self.path):
            pass
        command = [*before, host_programs() / 'afl-snapshot', self.path]
        fuzzer = Fuzzer(command, self.scratch_file('input'))
        self.addCleanup(fuzzer.close)
        return fuzzer

    def log_text(self):
        return Path(self.lib.status(self.path).directory.decode(),
                    'log').read_text(errors='replace')

    def test_late_kill(self):
        """
        A run ends the moment that it is killed for taking too long. Catches
        the end of the process that stood for it, taken for the next run's:
        a crash by signal 9 that is none.
        """
        fuzzer = self.fuzzer('timeout = 0')
        cpu = max(os.sched_getaffinity(0))
        busy = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
        self.addCleanup(busy.wait)
        self.addCleanup(busy.kill)
        os.sched_setaffinity(busy.pid, {cpu})
        for i in range(20):
            pid = fuzzer.begin(b'FUZ?')
            # It gets no time to end in.
            os.sched_setaffinity(pid, {cpu})
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
            self.assertTrue(fuzzer.readable(30))
            how = (signal.SIGKILL, signal.SIGTERM)[i % 2]
            fuzzer.kill(pid, how)
            self.assertEqual(fuzzer.read(), 0)
            pid = fuzzer.begin(b'FUZ!H')
            self.assertFalse(fuzzer.readable(0.2), 'the run after was ended')
            fuzzer.kill(pid, how)
            self.assertEqual(fuzzer.read(), how)

    def test_kill_near_the_end(self):
        """The same at any moment of a run, and with the CPU's own order"""
        rng = random.Random(1)
        cpus = os.sched_getaffinity(0)
        self.addCleanup(os.sched_setaffinity, 0, cpus)
        os.sched_setaffinity(0, {min(cpus)})
        fuzzer = self.fuzzer()
        for i in range(1000):
            pid = fuzzer.begin(b'FUZ?')
            time.sleep(rng.random() * 2e-4)
            fuzzer.kill(pid)
            self.assertIn(fuzzer.read(), (0, signal.SIGKILL))
            fuzzer.begin(b'FUx')
            self.assertEqual(fuzzer.read(), 0, i)

    def test_kill(self):
        """One that is killed in time is told of as AFL++ wants it."""
        fuzzer = self.fuzzer('timeout = 0')
        for how in signal.SIGKILL, signal.SIGTERM:
            pid = fuzzer.begin(b'FUZ!H')
            self.assertFalse(fuzzer.readable(0.3))
            fuzzer.kill(pid, how)
            self.assertEqual(fuzzer.read(), how)
            fuzzer.begin(b'FUx')
            self.assertEqual(fuzzer.read(), 0)

    def test_gone(self):
        """
        The fuzzer is killed in a run that has no end. Catches a process that
        stays, and keeps the machine.
        """
        for before in (), ('sh', '-c', '"$@"; exit 0', 'sh'):
            fuzzer = self.fuzzer('timeout = 0', before=before)
            fuzzer.begin(b'FUZ!H')
            self.assertFalse(fuzzer.readable(0.3))
            os.close(fuzzer.control)
            os.close(fuzzer.status)
            fuzzer.process.wait(timeout=10)
            fuzzer.control, fuzzer.status = os.pipe()
            self.assertEqual(self.lib.status(self.path).user, 0)
            with self.lib.Machine(self.path, flags=self.lib.ATTACH) as vm:
                self.assertEqual(vm.run(b'FUx').result, self.lib.OK)
            self.lib.stop(self.path)

    def interrupts(self):
        """How many the fuzzer gets, which is this process"""
        got = []
        old = signal.signal(signal.SIGINT, lambda *_: got.append(1))
        self.addCleanup(signal.signal, signal.SIGINT, old)
        return got

    def test_stop(self):
        """
        The guest wants no more. Catches a script or a debugger, which is no
        fuzzer, that is ended instead.
        """
        got = self.interrupts()
        for before in (), ('sh', '-c', '"$@"; echo ended', 'sh'):
            fuzzer = self.fuzzer(before=before)
            fuzzer.begin(b'FUZ!S')
            self.assertEqual(fuzzer.read(), 0)
            self.assertEqual(len(got), 1)
            got.clear()
            # It is up to the fuzzer.
            fuzzer.begin(b'FUx')
            self.assertEqual(fuzzer.read(), 0)
            self.assertIsNone(fuzzer.process.poll())
            self.lib.stop(self.path)

    def test_stop_nobody(self):
        """Catches a signal to whoever adopted it."""
        got = self.interrupts()
        fuzzer = self.fuzzer(before=('sh', '-c', '"$@" & sleep 0.5', 'sh'))
        fuzzer.process.wait(timeout=10)
        fuzzer.begin(b'FUZ!S')
        self.assertEqual(fuzzer.read(), 0)
        self.assertEqual(got, [])
        self.assertIn('no process that this one descends from',
                      self.log_text())

    def test_reset(self):
        """A user's reset between two runs costs none of them."""
        fuzzer = self.fuzzer()
        for data, status in ((b'FUx', 0), (b'FUZ!C', 11), (b'FUx', 0)):
            with monitor(self.lib.status(self.path).directory) as qmp:
                qmp.cmd('system_reset')
            # The guest may be READY again, or not yet.
            time.sleep(2 if status else 0)
            fuzzer.begin(data)
            self.assertEqual(fuzzer.read(), status)

    def test_mute(self):
        """Catches a start that takes long, and says nothing to the user."""
        path = self.describe_guest('boot = 8', options='mute=1')
        said = self.scratch_file('said')
        fuzzer = ('import os, sys; r, w = os.pipe(); os.dup2(w, 199); '
                  'os.dup2(r, 198); import subprocess; '
                  'subprocess.run(sys.argv[1:], pass_fds=(198, 199), '
                  'stderr=subprocess.DEVNULL)')
        with open(said, 'w', encoding='utf-8') as stderr:
            subprocess.run([sys.executable, '-c', fuzzer,
                            host_programs() / 'afl-snapshot', path],
                           stderr=stderr, timeout=60)
        self.assertRegex(Path(said).read_text(encoding='utf-8'),
                         r'(?s)for [5-9] s, the guest is not READY.*the guest '
                         r'is there.*not get READY in 8 s.*the guest is there')


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
        # A tool does not wait for the bridge, which has the machine till then.
        self.wait_for_nobody()
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
            self.check_one_machine()

    def start_role(self, role, name, out, *args):
        return subprocess.Popen(
            self.command('afl-fuzz', '-o', out, role, name, '-i', *args),
            env={**self.env, **({'AFL_IMPORT_FIRST': '1'} if name == 'c' else
                                {})},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def test_parallel(self):
        """
        Two on two CPUs, each with a machine and a seed of its own. Catches two
        that share a machine, or wait for one; one that finds nothing; and
        finds that AFL++'s own sync does not carry to another.
        """
        for _ in self.each_version():
            out = self.work / 'out'
            seeds = self.inputs(a=b'FUZ!', b=b'zz')
            both = {}
            for name, role in (('a', '-M'), ('b', '-S')):
                own = self.work / name
                own.mkdir()
                shutil.copy(seeds / name, own)
                both[name] = self.start_role(role, name, out, own, '-V', '12'
                                             if name == 'a' else '5')
            self.assertEqual(both['b'].wait(timeout=100), 0)
            # A third, on its machine, has no time to find so much.
            self.assertEqual(self.start_role(
                '-S', 'c', out, self.work / 'b', '-V', '2').wait(timeout=100),
                0)
            self.assertIsNone(both['a'].poll())
            self.assertEqual(both['a'].wait(timeout=100), 0)
            for name, words in (('a', 'op:'), ('b', 'op:'), ('c', 'sync:a')):
                stats = (out / name / 'fuzzer_stats').read_text()
                runs = int(re.search(r'execs_done +: (\d+)', stats)[1])
                self.assertGreater(runs, 100)
                files = [file.name for file in (out / name).glob('*/id*')]
                self.assertTrue([file for file in files if words in file],
                                f'{name} has no {words}: {files}')
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

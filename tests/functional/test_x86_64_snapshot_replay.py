#!/usr/bin/env python3
#
# Functional test of snapshot-vm replay, on the guest of snapshot/fuzz.c
#
# SPDX-License-Identifier: GPL-2.0-or-later

from pathlib import Path
import re
import shutil
import signal
import subprocess

from snapshot.gdb import Gdb
from snapshot.machines import MachinesTest, guest, host_programs


INPUT = 0x400000                # where fuzz.c has it


def functions():
    """Of the guest: the addresses of each one's first byte, and behind it"""
    lines = subprocess.check_output(['nm', '-S', guest()], text=True)
    found = {}
    for address, size, name in re.findall(r'^(\w+) (\w+) [tT] (\w+)$', lines,
                                          re.MULTILINE):
        found[name] = range(int(address, 16),
                            int(address, 16) + int(size, 16))
    return found


class Replay(MachinesTest):

    def setUp(self):
        super().setUp()
        self.path = self.describe_guest('timeout = 2000')

    def input_file(self, data):
        # The name is one of AFL++'s, commas and colons in it.
        path = Path(self.scratch_file('id:000000,sig:11,src:000000,op:havoc'))
        path.write_bytes(data)
        return path

    def start(self, data, *args):
        return subprocess.Popen(
            [host_programs() / 'snapshot-vm', 'replay', self.path,
             self.input_file(data), *args], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)

    def replay(self, data, *args):
        process = self.start(data, *args)
        output = process.communicate(timeout=60)[0]
        self.assertEqual(process.returncode, 0, output)
        return output

    def stopped(self, data):
        """One that waits for gdb: its process, where it stands, its socket"""
        process = self.start(data)
        pc = None
        for line in process.stdout:
            pc = pc or re.search(r'stopped at 0x([0-9a-f]+)\.', line)
            socket = re.search(r"gdb -ex 'target remote (.*)'", line)
            if socket:
                return process, int(pc[1], 16), socket[1]
        self.fail(f'no line for gdb; status {process.wait()}')

    def end(self, process, words):
        output = process.communicate(timeout=60)[0]
        self.assertEqual(process.returncode, 0, output)
        self.assertIn(words, output)

    def check_machine(self):
        """Catches a machine that stays stopped, slow, or in a debugger."""
        with self.lib.Machine(self.path, flags=self.lib.ATTACH) as vm:
            run = vm.run(b'FUZ?')
            self.assertEqual((run.result, run.text), (self.lib.OK, ''))
            self.assertFalse((Path(vm.directory) / 'gdb').exists())

    def test_gdb(self):
        """
        Catches a run that begins with another input, elsewhere than behind
        READY, or that goes on before somebody lets it.
        """
        where = functions()
        data = b'FUZ!C and more'
        for _ in range(2):
            process, pc, socket = self.stopped(data)
            self.assertIn(pc, where['case_fuzz'])
            gdb = Gdb(socket)
            self.assertEqual(gdb.pc(), pc)
            self.assertEqual(gdb.memory(INPUT, len(data)), data)
            # Behind READY, the guest reads STATUS, which says: a run.
            gdb.step()
            self.assertNotEqual(gdb.pc(), pc)
            self.assertIn(gdb.pc(), where['case_fuzz'])
            self.assertIsNone(process.poll())
            gdb.detach()
            self.end(process, 'crash (the guest said so)')
            self.check_machine()

    def test_breakpoint(self):
        """Catches a debugger that sees another run than the one replayed."""
        there = functions()['acpi_power_off'].start
        process, _, socket = self.stopped(b'FUZ!O')
        gdb = Gdb(socket)
        gdb.breakpoint(there)
        self.assertRegex(gdb.go(), '^[ST]05')
        self.assertEqual(gdb.pc(), there)
        self.assertEqual(gdb.memory(INPUT, 5), b'FUZ!O')
        gdb.breakpoint(there, False)
        gdb.detach()
        self.end(process, 'crash (shutdown)')
        self.check_machine()

    def test_gdb_itself(self):
        """As people do it, with the command that is printed"""
        if not shutil.which('gdb'):
            self.skipTest('no gdb: apt-get install gdb')
        process, pc, socket = self.stopped(b'FUZ!C')
        output = subprocess.check_output(
            ['gdb', '-q', '-batch', '-nx', '-ex', f'target remote {socket}',
             '-ex', 'print/x $pc', '-ex', f'x/5cb {INPUT}', '-ex', 'detach'],
            text=True, stderr=subprocess.STDOUT, timeout=60)
        self.assertIn(f'0x{pc:x}', output)
        self.assertRegex(output, "'F'.*'U'.*'Z'.*'!'.*'C'")
        self.end(process, 'the planted crash')
        self.check_machine()

    def test_interrupted(self):
        """Ctrl-C, before gdb has come, and while it is there"""
        for connect in False, True:
            process, _, socket = self.stopped(b'FUZ!H')
            gdb = Gdb(socket) if connect else None
            process.send_signal(signal.SIGINT)
            self.end(process, 'hang (cancelled)')
            if gdb:
                gdb.socket.close()
            self.check_machine()

    def blocks(self, data):
        """Where the blocks begin that a run executes, in their order"""
        trace = Path(self.scratch_file('trace log'))
        output = self.replay(data, '--trace', trace)
        self.assertIn(f'{trace} has each block', output)
        found = re.findall(r'^Trace \d+: \w+ \[\w+/(\w+)/', trace.read_text(),
                           re.MULTILINE)
        self.check_machine()
        size = trace.stat().st_size
        self.check_machine()
        # Only that run is in it.
        self.assertEqual(trace.stat().st_size, size)
        return output, [int(address, 16) for address in found]

    def test_trace(self):
        """Catches a log of another run, or of a part of it."""
        where = functions()
        output, crash = self.blocks(b'FUZ!O')
        self.assertIn('crash (shutdown)', output)
        self.assertIn(crash[0], where['case_fuzz'])
        self.assertTrue(set(crash) & set(where['acpi_power_off']))
        output, harmless = self.blocks(b'FUZ?')
        self.assertIn(': ok (', output)
        self.assertEqual(harmless[0], crash[0])
        self.assertFalse(set(harmless) & set(where['acpi_power_off']))
        self.assertEqual(self.blocks(b'FUZ?')[1], harmless)

    def test_log(self):
        """Catches what an earlier run has said, or what this one has not."""
        log = Path(self.scratch_file('log'))
        for data, result, text, console in (
                (b'FUZ!P', 'crash', '',
                 'Kernel panic - not syncing: planted\n'),
                (b'FUZ!C', 'crash', 'the planted crash', ''),
                (b'FUZ?', 'ok', '', '')) * 2:
            self.assertIn(f': {result} (', self.replay(data, '--log', log))
            found = log.read_text()
            self.assertIn(f'result: {result}\n', found)
            self.assertIn(f'text: {text}\n', found)
            self.assertEqual(found.partition('console:\n')[2], console)
            self.check_machine()

    def test_refused(self):
        """Catches a machine that is kept, or changed, for nothing."""
        def refused(words, *args):
            process = self.start(b'FUZ?', *args)
            output = process.communicate(timeout=60)[0]
            self.assertIn(words, output)
            self.assertNotEqual(process.returncode, 0)

        self.replay(b'FUZ?', '--log', '/dev/null')
        refused('No such file', '--trace', '/nonesuch/log')
        self.check_machine()
        refused('such a name', '--trace', 'a"b')
        self.check_machine()
        refused('snapshot-vm replay VM FILE', '--nonsense', 'x')


if __name__ == '__main__':
    MachinesTest.main()

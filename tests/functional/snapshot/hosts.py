# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of programs that have a machine of contrib/snapshot/host"""

import multiprocessing
import os
import signal
import time
import traceback

from qemu.qmp.legacy import QEMUMonitorProtocol

from .machines import MachinesTest, library


def monitor(directory):
    """That of a machine's QEMU"""
    qmp = QEMUMonitorProtocol(os.path.join(os.fsdecode(directory), 'qmp'))
    qmp.connect()
    return qmp


def hold(path, data, pipe):
    """Of a process of its own: begin a run, and be killed"""
    vm = library().Machine(path)
    if data is not None:
        vm.begin(data)
    pipe.send(vm.instance)
    time.sleep(600)


class HostTest(MachinesTest):

    def outcome_apart(self, seconds, call, *args):
        """
        Of a process of its own, as it may hang, or end by a signal. Returns:
        None, or the code and text of a Failure
        """
        here, there = multiprocessing.Pipe()
        pid = os.fork()
        if not pid:
            try:
                call(*args)
                there.send(None)
            except self.lib.Failure as failure:
                there.send((failure.code, str(failure)))
            except BaseException:
                there.send(traceback.format_exc())
            os._exit(0)
        there.close()
        try:
            self.assertTrue(here.poll(seconds), f'it takes over {seconds} s')
            result = here.recv()
        except EOFError:
            result = f'it was ended by signal {os.waitpid(pid, 0)[1] & 127}'
            pid = 0
        finally:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        self.assertNotIsInstance(result, str, result)
        return result

    def apart(self, seconds, call, *args):
        self.assertIsNone(self.outcome_apart(seconds, call, *args))

    def apart_fails(self, seconds, code, words, call, *args):
        failure = self.outcome_apart(seconds, call, *args)
        self.assertIsNotNone(failure, 'it did not fail')
        self.assertEqual(failure[0], code, failure[1])
        self.assertRegex(failure[1], words)

    def assert_fails(self, code, words, call, *args):
        with self.assertRaises(self.lib.Failure) as caught:
            call(*args)
        self.assertEqual(caught.exception.code, code, caught.exception)
        self.assertRegex(str(caught.exception), words)

    def wait_until(self, condition, seconds=15):
        end = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), end, 'it never was so')
            time.sleep(0.01)

    def qemu(self, path, instance=0):
        return self.lib.status(path, instance).qemu

    def kill_holder(self, path, data):
        """A program that has a machine is killed."""
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context('spawn').Process(
            target=hold, args=(path, data, there))
        process.start()
        instance = here.recv()
        self.assertEqual(self.lib.status(path, instance).user, process.pid)
        process.kill()
        process.join()
        self.assertEqual(self.lib.status(path, instance).user, 0)

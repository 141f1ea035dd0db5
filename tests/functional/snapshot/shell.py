# SPDX-License-Identifier: GPL-2.0-or-later
"""The shell of a Debian guest, on its serial line"""

import os
import re
import socket
import time

from qemu_test import QemuSystemTest

# How many times slower QEMU is than one without sanitizers
PATIENCE = int(os.getenv('QEMU_TEST_SNAPSHOT_PATIENCE', '1'))
PROMPT = ':~# '


class ShellTest(QemuSystemTest):
    """
    What the shell writes is between two words that its command does not hold,
    as the terminal shows that, too. The kernel's words go to the console as
    well.
    """

    def launch(self):
        """self.vm, with one serial line more"""
        path = os.path.join(self.socket_dir().name, 'line')
        self.vm.add_args('-chardev', f'socket,id=line,path={path},server=on,'
                                     'wait=off,logfile=' +
                                     self.log_file('serial.log'),
                         '-serial', 'chardev:line')
        self.vm.launch()
        self.line = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.line.close)
        self.line.connect(path)
        self.line.settimeout(1)

    def wait_for(self, pattern, timeout=120):
        """What the guest has printed until it came to @pattern"""
        output = ''
        end = time.monotonic() + timeout * PATIENCE
        while not re.search(pattern, output, re.DOTALL):
            self.assertLess(time.monotonic(), end,
                            f'no {pattern}: {output[-2000:]}')
            try:
                output += self.line.recv(4096).decode(errors='replace')
            except TimeoutError:
                continue
            for complaint in ('BUG:', 'WARNING:', 'Call Trace', 'EXT4-fs error',
                              'I/O error', 'blocked for more'):
                self.assertNotIn(complaint, output)
        return output.replace('\r', '')

    def send(self, text):
        self.line.sendall(text.encode() + b'\n')

    def log_in(self, commands=''):
        for line in 'root', f'dmesg -n 1; {commands}':
            self.send(line)
            self.wait_for(PROMPT)

    def shell(self, commands, timeout=120):
        """What @commands print"""
        commands = '; '.join(commands.strip().split('\n'))
        self.send(f"echo be''gin; {commands}; echo en''d")
        # With the prompt, or a later wait would find that one
        output = self.wait_for(f'\nend\r\n.*{PROMPT}', timeout)
        return output.split('begin\n')[1].split('\nend\n')[0]

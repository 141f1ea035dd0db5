# SPDX-License-Identifier: GPL-2.0-or-later
"""
What is measured, and how: each of Bench's functions measures one thing and
returns records. A record is a dictionary that says

    what was restored   guest, machine, ram (MiB), accel, smp, virtio: a Setup
    in which way        engine: dirty, remap (the snapshot device with ram=...),
                        loadvm, snapshot-load, incoming, memcpy, fork
    after what          pages: written to by the guest since the save
    how long it took    us: median, p10, p99, p999, of n restores
                        phases_us: medians of their parts
                        per_second: restores, with what the guest does between
    and more            save_us; resets: the part of them that needed a reset
"""

import dataclasses
import os
from pathlib import Path
import shutil
import subprocess
import time

from machine import (BenchError, Machine, PHASES, parse_restores,
                     parse_totals)
import stats


@dataclasses.dataclass(frozen=True)
class Setup:
    """A virtual machine"""

    guest: str          # bare, linux
    machine: str        # pc, q35
    ram: int            # MiB
    accel: str = 'tcg'
    smp: int = 1
    virtio: bool = False

    def __str__(self):
        size = f'{self.ram >> 10}G' if self.ram % 1024 == 0 else f'{self.ram}M'
        return ' '.join([self.accel, self.machine, self.guest, size] +
                        ([f'smp {self.smp}'] if self.smp > 1 else []) +
                        (['virtio'] if self.virtio else []))

    def record(self, engine, pages, **result):
        return {'engine': engine, **dataclasses.asdict(self), 'pages': pages,
                **result}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure one thing"""

    restores: int       # of which percentiles are taken
    seconds: float      # but no longer than this
    rate_seconds: float
    stock: int          # the same for what takes 100 ms
    stock_seconds: float
    floor_seconds: float
    turns: int          # of each of two machines
    turn_seconds: float
    calls_seconds: float
    fio: int            # rounds of fio
    fio_seconds: int
    loop: int           # rounds of the fuzzing loop and its rivals
    loop_seconds: float
    saves: int          # of a slot to a file, and of each other way
    save_mib: int       # of RAM
    starts: int         # from it
    workers: int        # that share it


class Bench:
    """The files and programs that measurements need"""

    def __init__(self, qemu, before, linux, directory, effort):
        self.qemu = qemu
        self.before = before    # an older one, or None
        self.linux = Path(linux)
        self.directory = Path(directory)
        self.effort = effort
        self.image = self.directory / 'guest.elf'
        self.floor_program = self.directory / 'floor'
        self.disk = self.directory / 'disk'
        with open(self.disk, 'wb') as f:
            f.truncate(16 << 20)

    def _machine(self, setup, *args):
        if setup.guest == 'bare':
            kernel = ['-vga', 'none', '-kernel', self.image]
        else:
            kernel = ['-kernel', self.linux / 'vmlinuz',
                      '-initrd', self.linux / 'initramfs',
                      '-serial', 'chardev:console', '-no-reboot', '-append',
                      'console=ttyS0 quiet panic=-1 snapshot.run=bench']
        if setup.virtio:
            # Read-only: the snapshot device does not put back what disks hold
            kernel += ['-device', 'virtio-net-pci',
                       '-device', 'virtio-serial-pci', '-drive',
                       f'if=virtio,format=raw,readonly=on,file={self.disk}']
        return Machine(self.qemu,
                       ['-machine', setup.machine, '-accel', setup.accel,
                        '-nodefaults', '-display', 'none',
                        # Or the RTC is behind the host after each restore,
                        # and its timer wakes the main loop
                        '-rtc', 'clock=vm',
                        '-m', f'{setup.ram}M', '-smp', str(setup.smp),
                        *map(str, kernel), *args], self.directory)

    # Our engine

    def restores(self, setup, engine, pages_list):
        """
        @engine: dirty or remap. A bare guest does one number of pages a
        boot; Linux, which takes longer to boot, is led back by a snapshot of
        the host's, made while it waits for a command.
        """
        records = []
        device = ['-device', f'snapshot,ram={engine}']
        if setup.guest == 'bare':
            for pages in pages_list:
                mark = self._mark(setup, engine, pages)
                with self._machine(setup, *device, '-append',
                                   f'case=bench pages={pages} mark={mark}'
                                   ) as m:
                    records.append(setup.record(
                        engine, pages, **self._restores(m, mark)))
            return records

        with self._machine(setup, *device) as m:
            m.wait_boot('bench: ready')
            time.sleep(0.2)     # for the guest to have come to its read()
            for again, pages in enumerate(pages_list):
                mark = self._mark(setup, engine, pages)
                if again:
                    m.qmp('x-snapshot-device-restore', slot=1)
                elif len(pages_list) > 1:
                    m.qmp('x-snapshot-device-save', slot=1)
                m.type(f'restore {pages} {mark}')
                records.append(setup.record(
                    engine, pages, **self._restores(m, mark)))
            saves = self._repeat(lambda: m.qmp('x-snapshot-device-save',
                                               slot=2), 3)
            for record in records:
                record['save_us'] = stats.distribution(saves)['median']
        return records

    @staticmethod
    def _mark(setup, engine, pages):
        """Restores for a dot: some hundred dots a second"""
        slow = engine == 'remap' or setup.virtio
        return (10 if slow else 100) // (10 if pages > 100 else 1)

    def _restores(self, m, mark):
        effort = self.effort
        first = m.dots[-1][1] if m.dots else 0

        # The first restores translate the guest's code
        m.wait_dots(first + 3)
        begin, start = len(m.dots) - 1, time.monotonic()
        while True:
            time.sleep(0.02)
            took = time.monotonic() - start
            if took >= effort.rate_seconds and len(m.dots) - begin > 8 or \
                    took >= 10 * effort.rate_seconds:
                break
        rates = stats.rates(m.dots[begin:], mark)

        # The event that comes behind the last clock reading, for the total ...
        m.trace('vm_snapshot_restore')
        totals = parse_totals(m.trace_lines(effort.restores, effort.seconds))
        # ... and the inner one, which takes time itself, for the parts
        m.trace('vm_snapshot_restore', 'vm_snapshot_load')
        restores = parse_restores(m.trace_lines(
            2 * min(effort.restores, 500), effort.seconds))
        m.trace()
        if not totals or not restores:
            m.fail('trace events are not as expected')

        def phases(fraction):
            return {phase: stats.percentile(
                        sorted(getattr(r, phase) for r in restores),
                        fraction) / 1000 for phase in PHASES}

        # Medians count; p10 and p90 of rates are what it is when the host
        # does nothing else, which a comparison of runs wants to know
        return {
            'n': len(totals),
            'per_second': stats.percentile(rates, 0.5) if rates else None,
            'per_second_p90': stats.percentile(rates, 0.9) if rates else None,
            'us': stats.distribution(totals),
            'phases_us': phases(0.5),
            'phases_p10_us': phases(0.1),
            'pages_copied': stats.median([r.pages for r in restores]),
            'resets': sum(r.reset > 0 for r in restores) / len(restores),
        }

    # What there was before

    def stock(self, setup, pages):
        """savevm/loadvm and snapshot-save/-load: RAM in a qcow2 file"""
        file = self.directory / 'vmstate.qcow2'
        subprocess.run([qemu_img(self.qemu), 'create', '-q', '-f', 'qcow2',
                        file, '64G'], check=True)
        with self._machine(setup, '-blockdev',
                           'driver=qcow2,node-name=vmstate,file.driver=file,'
                           f'file.filename={file}') as m:
            self._touch(m, pages)
            savevm = self._repeat(lambda: m.hmp('savevm one'), 3)
            loadvm = self._repeat(lambda: m.hmp('loadvm one'))
            m.hmp('delvm one')

            save = self._repeat(lambda: self._job(m, 'snapshot-save'), 1)
            load = self._repeat(lambda: self._job(m, 'snapshot-load'))
        file.unlink()
        return [self._stock_record(setup, 'loadvm', pages, savevm, loadvm),
                self._stock_record(setup, 'snapshot-load', pages, save, load)]

    @staticmethod
    def _job(m, command):
        m.qmp(command, job_id='job', tag='two', vmstate='vmstate',
              devices=['vmstate'])
        m.wait_event('JOB_STATUS_CHANGE', id='job', status='concluded')
        error = m.qmp('query-jobs')[0].get('error')
        m.qmp('job-dismiss', id='job')
        if error:
            m.fail(f'{command}: {error}')

    def incoming(self, setup, pages):
        """A new process each, that loads RAM from a file: mapped-ram"""
        file = self.directory / 'incoming.state'
        mapped = ['-global', 'migration.mapped-ram=on']
        with self._machine(setup, *mapped) as m:
            self._touch(m, pages)
            start = time.monotonic()
            m.qmp('migrate', uri=f'file:{file}')
            while m.qmp('query-migrate').get('status') != 'completed':
                time.sleep(0.01)
            saves = [(time.monotonic() - start) * 1e9]

        def once():
            with self._machine(setup, *mapped, '-incoming',
                               f'file:{file}') as m:
                while m.qmp('query-status')['status'] != 'running':
                    time.sleep(0.001)
                return time.monotonic() - m.started

        times = self._repeat(once)
        file.unlink()
        return [self._stock_record(setup, 'incoming', pages, saves, times)]

    @staticmethod
    def _touch(m, pages):
        m.wait_boot('bench: ready')
        m.type(f'touch {pages}')
        m.wait_dots(1)

    def _repeat(self, once, count=None):
        """Nanoseconds of each; @once may say itself how long it took."""
        times = []
        end = time.monotonic() + self.effort.stock_seconds
        while len(times) < (count or self.effort.stock) and \
                (time.monotonic() < end or len(times) < 3):
            start = time.monotonic()
            took = once()
            if not isinstance(took, float):
                took = time.monotonic() - start
            times.append(took * 1e9)
            # For the guest to write to its pages again
            time.sleep(0.005)
        return times

    @staticmethod
    def _stock_record(setup, engine, pages, saves, times):
        us = stats.distribution(times)
        return setup.record(engine, pages, n=len(times),
                            per_second=1e6 / us['median'], us=us,
                            save_us=stats.distribution(saves)['median'])

    # The least that it can cost

    def floor(self, engine, ram, pages_list):
        """@engine: memcpy or fork, of a process that has @ram MiB"""
        records = []
        for pages in pages_list:
            out = subprocess.run(
                [self.floor_program, engine, str(pages), str(ram),
                 str(10 * self.effort.restores),
                 str(self.effort.floor_seconds)],
                check=True, text=True, stdout=subprocess.PIPE).stdout
            times = list(map(int, out.split()))
            us = stats.distribution(times)
            records.append({
                'engine': engine, 'guest': None, 'machine': None, 'ram': ram,
                'accel': None, 'smp': 1, 'virtio': False, 'pages': pages,
                'n': len(times), 'us': us,
                'per_second': 1e6 / us['median'] if us['median'] else None})
        return records


def qemu_img(qemu):
    """Beside QEMU, where "make build" leaves it, or the system's"""
    beside = Path(os.path.realpath(qemu)).parent / 'qemu-img'
    found = str(beside) if beside.exists() else shutil.which('qemu-img')
    if not found:
        raise BenchError('there is no qemu-img; run: apt-get install '
                         'qemu-utils')
    return found


def kvm_missing():
    """Why KVM cannot be used, or None"""
    if not os.path.exists('/dev/kvm'):
        return 'there is no /dev/kvm'
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        return 'no permission to use /dev/kvm: join the group kvm'
    flags = ('kvm_intel/parameters/ept', 'kvm_amd/parameters/npt')
    paths = [Path('/sys/module', flag) for flag in flags]
    if not any(p.exists() and p.read_text()[0] in 'Y1' for p in paths):
        return 'it has no two-dimensional paging, and ram=dirty needs that'
    return None

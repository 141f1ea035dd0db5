# SPDX-License-Identifier: MIT
"""
Runs of a guest of "-device snapshot", for scripts on the host

    with Machine('toy.vm') as vm:
        run = vm.run(b'input')
        print(run.name, run.cause_name, run.text, len(run.coverage))

It calls libsnapshot-host.so, which lies beside this file, or where
SNAPSHOT_HOST_LIBRARY says; snapshot-host.h explains what it does.
"""

import ctypes as c
import os
from pathlib import Path

OK, CRASH, SANITIZER, HANG, STOP, INVALID = range(6)
(GUEST, PANIC, RESET, SHUTDOWN, STOPPED, HOST_TIME, GUEST_TIME,
 CANCELLED) = range(8)
(E_SYSTEM, E_DESCRIPTION, E_BUSY, E_ABSENT, E_START, E_NOT_READY, E_PROTOCOL,
 E_DIED, E_STUCK, E_ENDED, E_LENGTH, E_USE) = range(1, 13)
ATTACH, FRESH = 1, 2
RAN, BOOTED, KEPT, LOADED = range(4)
RUN_STOPPED = 1


TELL = c.CFUNCTYPE(None, c.c_char_p)


class Limits(c.Structure):
    _fields_ = [('host_ns', c.c_uint64), ('guest_ns', c.c_uint64),
                ('flags', c.c_uint32)]


class Result(c.Structure):
    _fields_ = [('result', c.c_uint32), ('cause', c.c_uint32),
                ('host_ns', c.c_uint64), ('guest_ns', c.c_uint64),
                ('coverage', c.POINTER(c.c_ubyte)),
                ('coverage_size', c.c_size_t),
                ('text', c.POINTER(c.c_char)), ('text_length', c.c_size_t)]


class Status(c.Structure):
    _fields_ = [('instance', c.c_int), ('daemon', c.c_int), ('qemu', c.c_int),
                ('user', c.c_int), ('directory', c.c_char * 256)]


def _library():
    path = os.environ.get('SNAPSHOT_HOST_LIBRARY') or \
        Path(__file__).resolve().with_name('libsnapshot-host.so')
    library = c.CDLL(str(path))
    pointer, size = c.c_void_p, c.c_size_t
    for name, result, *arguments in (
            ('error', c.c_char_p),
            ('error_code', c.c_int),
            ('open', pointer, c.c_char_p, c.c_int, c.c_uint),
            ('close', None, pointer),
            ('restart', c.c_int, pointer),
            ('stop', c.c_int, c.c_char_p, c.c_int),
            ('status', c.c_int, c.c_char_p, c.c_int, c.POINTER(Status)),
            ('instance', c.c_int, pointer),
            ('began', c.c_int, pointer, c.POINTER(c.c_char_p),
             c.POINTER(c.c_uint64)),
            ('on_wait', None, TELL),
            ('directory', c.c_char_p, pointer),
            ('limits', None, pointer, c.POINTER(Limits)),
            ('input', pointer, pointer, c.POINTER(size)),
            ('coverage_size', size, pointer),
            ('begin', c.c_int, pointer, size, c.POINTER(Limits)),
            ('end', c.c_int, pointer, c.POINTER(Result)),
            ('cancel', None, pointer),
            ('fd', c.c_int, pointer),
            ('console', size, c.c_char_p, c.c_int, c.c_char_p, size),
            ('result_name', c.c_char_p, c.c_uint32),
            ('cause_name', c.c_char_p, c.c_uint32)):
        function = getattr(library, 'snapshot_vm_' + name)
        function.restype = result
        function.argtypes = arguments
    return library


_lib = _library()


class Failure(Exception):
    """What the library says; code is one of E_*."""

    def __init__(self):
        super().__init__(_lib.snapshot_vm_error().decode(errors='replace'))
        self.code = _lib.snapshot_vm_error_code()


def _check(value):
    if value < 0:
        raise Failure
    return value


class Run:
    """How a run ended; the bytes are copies"""

    def __init__(self, r):
        self.result, self.cause = r.result, r.cause
        self.host_ns, self.guest_ns = r.host_ns, r.guest_ns
        self.coverage = c.string_at(r.coverage, r.coverage_size) \
            if r.coverage else b''
        self.text = r.text[:r.text_length].decode(errors='replace')

    @property
    def name(self):
        return _lib.snapshot_vm_result_name(self.result).decode()

    @property
    def cause_name(self):
        return _lib.snapshot_vm_cause_name(self.cause).decode()


class Machine:
    """snapshot_vm_open() and what follows; errors raise Failure"""

    def __init__(self, description, instance=-1, flags=0):
        self._vm = _lib.snapshot_vm_open(os.fsencode(description), instance,
                                         flags)
        if not self._vm:
            raise Failure

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        vm, self._vm = self._vm, None
        _lib.snapshot_vm_close(vm)

    def restart(self):
        _check(_lib.snapshot_vm_restart(self._vm))

    def limits(self):
        limits = Limits()
        _check(_lib.snapshot_vm_instance(self._vm))
        _lib.snapshot_vm_limits(self._vm, c.byref(limits))
        return limits

    @property
    def instance(self):
        return _check(_lib.snapshot_vm_instance(self._vm))

    @property
    def began(self):
        """RAN, BOOTED, KEPT or LOADED"""
        return _check(_lib.snapshot_vm_began(
            self._vm, c.byref(c.c_char_p()), c.byref(c.c_uint64())))

    @property
    def directory(self):
        directory = _lib.snapshot_vm_directory(self._vm)
        if directory is None:
            raise Failure
        return Path(os.fsdecode(directory))

    @property
    def input_size(self):
        return self._input()[1]

    def _input(self):
        size = c.c_size_t()
        where = _lib.snapshot_vm_input(self._vm, c.byref(size))
        if not where:
            raise Failure
        return where, size.value

    @property
    def coverage_size(self):
        _check(_lib.snapshot_vm_instance(self._vm))
        return _lib.snapshot_vm_coverage_size(self._vm)

    def fileno(self):
        """Readable when a run has ended: for select()"""
        return _check(_lib.snapshot_vm_fd(self._vm))

    def begin(self, data, limits=None):
        where, size = self._input()
        # Where it does not fit, the library says so.
        c.memmove(where, data, min(len(data), size))
        _check(_lib.snapshot_vm_begin(self._vm, len(data),
                                      limits and c.byref(limits)))

    def end(self):
        result = Result()
        _check(_lib.snapshot_vm_end(self._vm, c.byref(result)))
        return Run(result)

    def cancel(self):
        _lib.snapshot_vm_cancel(self._vm)

    def run(self, data, limits=None):
        self.begin(data, limits)
        return self.end()


def on_wait(tell):
    """Have tell(text) called with what takes long, or makes a machine boot."""
    global _tell            # it must stay as long as the library has it
    callback = TELL(lambda text: tell(text.decode(errors='replace')))
    _lib.snapshot_vm_on_wait(callback)
    _tell = callback


def stop(description, instance=-1):
    """End an instance, or all; returns how many there were."""
    return _check(_lib.snapshot_vm_stop(os.fsencode(description), instance))


def status(description, instance=0):
    """A Status, or None if there never was such an instance"""
    found = Status()
    return found if _check(_lib.snapshot_vm_status(
        os.fsencode(description), instance, c.byref(found))) else None


def console(directory, qemu=False):
    """What was last written to the guest's console, or by QEMU"""
    buf = c.create_string_buffer(1 << 16)
    n = _lib.snapshot_vm_console(os.fsencode(directory), qemu, buf, len(buf))
    return buf.raw[:n].decode(errors='replace')

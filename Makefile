# SPDX-License-Identifier: GPL-2.0-or-later
#
# Every target does the set-up that it needs; what is made lies in build/.

help:
	@sed -n 's/^#: //p' Makefile

#: make demo           build, then show the device on a real Linux guest
#: make fuzz-demo      build, then fuzz Debian's kernel with AFL++: a file system,
#:                     and a module with a planted fault; DURATION=seconds (60)
#: make check          build, then run every test; one: scripts/check NAME
#:                     SANITIZE=1: with sanitizers for addresses and undefined
#:                     behaviour; SANITIZE=thread: for data races;
#:                     FULL=1: slow tests, too
#: make check-kvm      the tests that need KVM; without /dev/kvm, in a guest
#: make build          build/qemu-system-x86_64; QEMU_SRC=dir: of your QEMU 10.0
#: make style          check patches, scripts and documentation
#: make bench          measure restores; QUICK=1: in 6 minutes; CHECK=1: fail if
#:                     they became slower against what they are compared with;
#:                     BEFORE=qemu: beside an older binary; ONLY=text: only what
#:                     has it in its title, such as device
#: make soak           a million restores of a Linux guest, verified
#: make fuzz-device    QEMU's fuzzer on the device, and on machines with each other
#:                     device, with sanitizers: a million inputs, for hours
#: make compare        QEMU's own tests, with our change and without
#: make export         take edits in build/qemu back into the repository
#: make series         build/series/*.patch, to be mailed
#: make check-patches  do the patches apply exactly?
#: make clean          remove build/

demo: build
	@scripts/demo

fuzz-demo: build
	@scripts/fuzz-demo $(DURATION)

build:
	@scripts/build

check:
	@scripts/check

check-kvm:
	@scripts/check-kvm

style:
	@scripts/style

bench:
	@scripts/bench $(if $(QUICK),--quick) $(if $(CHECK),--check) \
		$(if $(BEFORE),--before '$(BEFORE)') $(if $(ONLY),--only '$(ONLY)')

soak:
	@scripts/soak

fuzz-device:
	@scripts/fuzz-device
	@scripts/fuzz-device --any

compare:
	@scripts/compare

export:
	@scripts/export

series:
	@scripts/series

check-patches:
	@scripts/check-patches

clean:
	rm -rf build

.PHONY: help demo fuzz-demo build check check-kvm style bench soak fuzz-device \
	compare export series check-patches clean

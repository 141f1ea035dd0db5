/*
 * Tests of the snapshot device: restores for which it is not enough to load
 * what changed
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "libqos/libqos-malloc.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "hw/pci/pci_regs.h"
#include "qobject/qdict.h"
#include "snapshot-utils.h"
#include "standard-headers/linux/virtio_config.h"

#define COM1 0x3f8

/* A virtio-rng that interrupts by INTx, with one queue */
typedef struct Rng {
    SnapshotVM *vm;
    QVirtioPCIDevice *pci;
    QGuestAllocator alloc;
    QVirtQueue *vq;
    uint64_t buffer;
} Rng;

static void rng_start(Rng *rng, SnapshotVM *vm)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(8, 0) };
    QVirtioDevice *d;

    rng->vm = vm;
    rng->pci = virtio_pci_new(vm->pci, &addr);
    d = &rng->pci->vdev;
    pc_alloc_init(&rng->alloc, vm->qts, ALLOC_NO_FLAGS);
    rng->buffer = guest_alloc(&rng->alloc, 64);
    qvirtio_pci_device_enable(rng->pci);
    qvirtio_start_device(d);
    qvirtio_set_features(d, qvirtio_get_features(d) &
                         ~(QVIRTIO_F_BAD_FEATURE |
                           1ull << VIRTIO_RING_F_INDIRECT_DESC |
                           1ull << VIRTIO_RING_F_EVENT_IDX));
    rng->vq = qvirtqueue_setup(d, &rng->alloc, 0);
    qvirtio_set_driver_ok(d);
}

static void rng_end(Rng *rng)
{
    qvirtqueue_cleanup(rng->pci->vdev.bus, rng->vq, &rng->alloc);
    g_free(rng->pci->pdev);
    g_free(rng->pci);
    alloc_destroy(&rng->alloc);
}

/* The line as the device tells it, which does not lower it */
static bool rng_interrupts(Rng *rng)
{
    return qpci_config_readw(rng->pci->pdev, PCI_STATUS) & PCI_STATUS_INTERRUPT;
}

static void rng_ack(Rng *rng)
{
    QVirtioDevice *d = &rng->pci->vdev;

    g_assert_true(d->bus->get_queue_isr_status(d, rng->vq));
    g_assert_false(rng_interrupts(rng));
}

/* Have a buffer filled; the device interrupts, and nobody answers. */
static void rng_interrupt(Rng *rng)
{
    QTestState *qts = rng->vm->qts;
    gint64 end = g_get_monotonic_time() + 10 * G_USEC_PER_SEC;
    uint32_t head = qvirtqueue_add(qts, rng->vq, rng->buffer, 64, true, false);

    qvirtqueue_kick(qts, &rng->pci->vdev, rng->vq, head);
    while (!rng_interrupts(rng)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        qtest_clock_step(qts, 1000);
    }
}

static void assert_exact(SnapshotVM *vm, uint64_t restores)
{
    QDict *info = snapshot_query(vm);

    g_assert_cmpuint(qdict_get_int(info, "verified"), ==, restores);
    g_assert_cmpuint(qdict_get_int(info, "mismatched"), ==, 0);
    qobject_unref(info);
    snapshot_assert_state(vm, "running");
}

static void restore(SnapshotVM *vm, bool host, unsigned slot)
{
    if (host) {
        snapshot_qmp(vm, "restore", slot);
    } else {
        snapshot_restore(vm, slot);
    }
}

/*
 * Catches: a bus whose count of interrupts is put back while its devices, to be
 * reset, have those of now; the reset then ends QEMU.  The same the other way
 * about, and a line that does not go back.
 */
static void test_intx(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults"
                                       " -rtc clock=vm"
                                       " -device virtio-rng-pci,addr=8",
                                       (const char *)machine);
    unsigned i, restores = 0;
    QVirtQueue low, high;
    Rng rng;

    rng_start(&rng, vm);
    snapshot_save(vm, 0);
    low = *rng.vq;
    rng_interrupt(&rng);
    snapshot_save(vm, 1);
    high = *rng.vq;

    for (i = 0; i < 8; i++) {
        const bool host = i & 1;

        restore(vm, host, 0);
        *rng.vq = low;
        g_assert_false(rng_interrupts(&rng));
        rng_interrupt(&rng);
        if (i & 2) {
            rng_ack(&rng);
        }
        restore(vm, host, 1);
        *rng.vq = high;
        g_assert_true(rng_interrupts(&rng));
        if (i & 4) {
            rng_ack(&rng);
        }
        restores += 2;
        assert_exact(vm, restores);
    }

    qtest_system_reset(vm->qts);
    snapshot_qmp(vm, "restore", 1);
    g_assert_true(rng_interrupts(&rng));
    rng_ack(&rng);
    assert_exact(vm, restores + 1);
    rng_end(&rng);
    snapshot_vm_end(vm);
}

/*
 * State that was absent at the save comes, and cannot be cleared by loading;
 * meanwhile an interrupt came, too.  Catches a device that is loaded before it
 * is known of another that a reset is needed.
 */
static void test_reshaped(const void *machine)
{
    SnapshotVM *vm = snapshot_vm_start(",verify=on", "-M %s -nodefaults"
                                       " -rtc clock=vm -serial null"
                                       " -device virtio-rng-pci,addr=8",
                                       (const char *)machine);
    QVirtQueue at_save;
    unsigned i;
    Rng rng;

    rng_start(&rng, vm);
    snapshot_save(vm, 0);
    at_save = *rng.vq;
    for (i = 0; i < 4; i++) {
        /* The UART's FIFO: a subsection of its own when it has a byte */
        qtest_outb(vm->qts, COM1 + 2, 0x01);
        qtest_outb(vm->qts, COM1 + 4, 0x10);
        qtest_outb(vm->qts, COM1, 0x55);
        /* An interrupt of the keyboard controller's, and its output buffer */
        qtest_outb(vm->qts, 0x64, 0xd2);
        qtest_outb(vm->qts, 0x60, 0x1e);
        if (i & 1) {
            rng_interrupt(&rng);
        }
        restore(vm, i & 2, 0);
        *rng.vq = at_save;
        g_assert_cmphex(qtest_inb(vm->qts, COM1 + 2), ==, 0x01);
        g_assert_cmphex(qtest_inb(vm->qts, COM1 + 4), ==, 0x08);
        assert_exact(vm, i + 1);
    }
    rng_end(&rng);
    snapshot_vm_end(vm);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    if (!qtest_has_device("snapshot")) {
        g_test_skip("there is no snapshot device");
        return g_test_run();
    }

    snapshot_add_tests("intx", test_intx);
    snapshot_add_tests("reshaped", test_reshaped);
    return g_test_run();
}

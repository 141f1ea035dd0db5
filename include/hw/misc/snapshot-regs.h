/* SPDX-License-Identifier: MIT */
/*
 * The registers of the snapshot device, "-device snapshot"
 *
 * The device and the guests that drive it include this one file, so it
 * includes nothing itself and holds plain numbers only: C, C++, assembly.
 * docs/specs/snapshot.rst explains what they do.
 *
 * Licensed under the MIT licence, that a guest of any licence may use it.
 */

#ifndef HW_MISC_SNAPSHOT_REGS_H
#define HW_MISC_SNAPSHOT_REGS_H

/* PCI identity; class "others" (0xff), one instance a machine */
#define SNAPSHOT_VENDOR_ID      0x1234
#define SNAPSHOT_DEVICE_ID      0xf987
#define SNAPSHOT_REVISION       0x10

/*
 * BAR0: memory, 32 bits, non-prefetchable, little-endian; bytes
 *
 * Accesses are aligned and 4 bytes wide, or 8 bytes to the 64-bit registers.
 * Offsets that are not listed read as 0 and ignore writes.
 */
#define SNAPSHOT_BAR            0
#define SNAPSHOT_BAR_SIZE       0x100000

/*
 * The registers are not part of a snapshot: a restore does not revert them.
 * R or W: the access that has a meaning. 64: eight bytes wide.
 *
 * PAGES is 0 where the way of putting RAM back does not count pages.
 * NANOSECONDS is host time, from vCPU stopped to vCPU running.
 */
#define SNAPSHOT_REG_COMMAND    0x000   /* W    SNAPSHOT_CMD_*, acts on SLOT */
#define SNAPSHOT_REG_STATUS     0x000   /* R    SNAPSHOT_STATUS_* */
#define SNAPSHOT_REG_SLOT       0x004   /* RW   slot of the next command */
#define SNAPSHOT_REG_SLOTS      0x008   /* R    number of slots */
#define SNAPSHOT_REG_FEATURES   0x00c   /* R    SNAPSHOT_FEATURE_* bits */
#define SNAPSHOT_REG_ARGUMENT   0x010   /* RW64 the guest's own word */
#define SNAPSHOT_REG_RESTORES   0x018   /* R64  of SLOT, since its save */
#define SNAPSHOT_REG_PAGES      0x020   /* R64  put back by the last restore */
#define SNAPSHOT_REG_NANOSECONDS 0x028  /* R64  that the last restore took */
#define SNAPSHOT_REG_RESULT     0x030   /* RW   SNAPSHOT_RESULT_*, for DONE */
#define SNAPSHOT_REG_INPUT_LENGTH 0x034 /* R    bytes of this run's input */
#define SNAPSHOT_REG_REGION     0x040   /* RW   SNAPSHOT_REGION_* of the two */
#define SNAPSHOT_REG_ADDRESS    0x048   /* RW64 its address at READY */
#define SNAPSHOT_REG_LENGTH     0x050   /* RW64 its bytes; 0: there is none */

/* COMMAND */
#define SNAPSHOT_CMD_SAVE       0x101   /* remember the machine in SLOT */
#define SNAPSHOT_CMD_RESTORE    0x102   /* go back to it: ends in its SAVE */
#define SNAPSHOT_CMD_DISCARD    0x103   /* forget it, free its memory */
#define SNAPSHOT_CMD_READY      0x111   /* SAVE, and wait for a run */
#define SNAPSHOT_CMD_DONE       0x112   /* end it: back to READY, and wait */

/*
 * STATUS: what brought execution here, as the value of setjmp() does. The
 * instruction behind a SAVE sees SAVED the first time, RESTORED ever after.
 * With ERROR set the command failed and changed nothing; the low bits say why.
 */
#define SNAPSHOT_STATUS_NONE      0x000 /* no command yet */
#define SNAPSHOT_STATUS_SAVED     0x101 /* this SAVE just finished */
#define SNAPSHOT_STATUS_RESTORED  0x102 /* a RESTORE of this snapshot did */
#define SNAPSHOT_STATUS_DISCARDED 0x103 /* this DISCARD just finished */
#define SNAPSHOT_STATUS_RUN       0x111 /* READY: an input is there */
#define SNAPSHOT_STATUS_ERROR     0x80000000u /* | SNAPSHOT_E_* */

#define SNAPSHOT_E_COMMAND      1       /* unknown command */
#define SNAPSHOT_E_EMPTY        2       /* no snapshot in this slot */
#define SNAPSHOT_E_SLOT         3       /* no such slot */
#define SNAPSHOT_E_UNSAVABLE    4       /* cannot be saved; host knows why */
#define SNAPSHOT_E_CHANGED      5       /* memory or a device came or went */
#define SNAPSHOT_E_NOMEM        6       /* the host has no memory for it */
#define SNAPSHOT_E_BUSY         7       /* another command is under way */
#define SNAPSHOT_E_CONTROL      8       /* QEMU was started without control= */
#define SNAPSHOT_E_REGION       9       /* a region is not RAM, or too long */
#define SNAPSHOT_E_RUN          10      /* DONE without READY, or READY twice */

/* RESULT of a run */
#define SNAPSHOT_RESULT_OK      0       /* the input was processed */
#define SNAPSHOT_RESULT_CRASH   1
#define SNAPSHOT_RESULT_SANITIZER 2     /* it has reported an error */
#define SNAPSHOT_RESULT_HANG    3       /* in general, the device's to say */
#define SNAPSHOT_RESULT_STOP    4       /* the host shall end the campaign */
#define SNAPSHOT_RESULT_INVALID 5       /* the guest could not run it */

/* REGION: of the guest's memory, which the device copies from and to */
#define SNAPSHOT_REGION_INPUT   0       /* written when a run begins */
#define SNAPSHOT_REGION_COVERAGE 1      /* read when it ends */
#define SNAPSHOT_REGION_TEXT    2       /* read then, up to a zero byte */
#define SNAPSHOT_REGIONS        3

/* BAR2, if there is a channel= and a control=: memory, 64 bits, prefetchable */
#define SNAPSHOT_CHANNEL_BAR    2

/* FEATURES; other bits are 0 */
#define SNAPSHOT_FEATURE_REMAP   (1u << 0) /* RAM put back by remapping */
#define SNAPSHOT_FEATURE_DIRTY   (1u << 1) /* RAM put back by dirty pages */
#define SNAPSHOT_FEATURE_CHANNEL (1u << 2) /* BAR2 is a channel to the host */
#define SNAPSHOT_FEATURE_CONTROL (1u << 3) /* run control */

#endif /* HW_MISC_SNAPSHOT_REGS_H */

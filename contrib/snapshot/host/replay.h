/* SPDX-License-Identifier: MIT */
/*
 * One run, for somebody to look at: in gdb, or in a log
 *
 * Licensed under the MIT licence, that a program of any licence may use it.
 */

#ifndef CONTRIB_SNAPSHOT_REPLAY_H
#define CONTRIB_SNAPSHOT_REPLAY_H

#include "snapshot-host.h"

enum replay_how {
    REPLAY_GDB,                 /* stop before the first instruction */
    REPLAY_TRACE,               /* write down each block that is executed */
    REPLAY_LOG,                 /* write down what the guest says */
};

/**
 * replay: run @length bytes of input, which are where snapshot_vm_input() says
 * @file: where to write to; NULL with REPLAY_GDB
 *
 * SIGINT ends the run.  What it prints is for a person.
 *
 * Returns: as snapshot_vm_run(); snapshot_vm_error() says why it failed
 */
int replay(struct snapshot_vm *vm, size_t length, enum replay_how how,
           const char *file, struct snapshot_vm_result *result);

#endif /* CONTRIB_SNAPSHOT_REPLAY_H */

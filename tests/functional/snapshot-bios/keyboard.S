/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A boot sector that writes to port 0xe9 each scan code that it gets */

#define DEBUGCON    0xe9
#define KBD_DATA    0x60
#define KBD_STATUS  0x64

    .code16
    .globl start
start:
    cli
1:  in $KBD_STATUS, %al
    test $1, %al
    jz 1b
    in $KBD_DATA, %al
    out %al, $DEBUGCON
    jmp 1b

    .org 510
    .word 0xaa55

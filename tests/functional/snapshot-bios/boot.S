/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A boot sector that reads its disk through the BIOS, again and again, and
 * writes to port 0xe9 a line for each time: the sum of all words of 32 bits,
 * or what went wrong
 *
 * -D SECTORS: of the disk; -D CHUNK: sectors read at once. A floppy disk is
 * read a track at a time. Each piece goes to the same place, so that data of an
 * old request which arrives late is taken for that of a later piece.
 */

#define DEBUGCON    0xe9
#define SEGMENT     0x1000              /* where the data goes */
#define SECTOR      512
#define TRACK       18                  /* sectors of a floppy disk */
#define TRACKS      160

    .code16
    .globl start
start:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7c00, %sp
    cld
    sti
    mov %dl, drive

pass:
    movl $0, sum
    movl $0, lba
    test $0x80, %dl
    jz floppy

piece:
    mov $packet, %si
    movb $0x42, %ah                     /* extended read */
    mov drive, %dl
    int $0x13
    jc fail
    mov $CHUNK, %cx
    call add_up
    addl $CHUNK, lba
    cmpl $SECTORS, lba
    jb piece
    jmp done

floppy:
    mov lba, %ax                        /* counts tracks here */
    mov %al, %dh
    and $1, %dh                         /* head */
    shr $1, %ax
    mov %al, %ch                        /* cylinder */
    mov $1, %cl
    mov $SEGMENT, %ax
    mov %ax, %es
    xor %bx, %bx
    mov $0x0200 + TRACK, %ax            /* read */
    mov drive, %dl
    int $0x13
    jc fail
    mov $TRACK, %cx
    call add_up
    incl lba
    cmpl $TRACKS, lba
    jb floppy

done:
    call print
    mov drive, %dl
    jmp pass

/* Add %cx sectors to the sum. */
add_up:
    mov $SEGMENT, %bx
1:  mov %bx, %es
    xor %di, %di
2:  mov %es:(%di), %eax
    add %eax, sum
    add $4, %di
    cmp $SECTOR, %di
    jb 2b
    add $SECTOR / 16, %bx
    loop 1b
    ret

/* The error, from %ah, is what it says instead of the sum. */
fail:
    mov $'!', %al
    out %al, $DEBUGCON
    mov %ax, sum
    call print
1:  hlt
    jmp 1b

print:
    mov sum, %ebx
    mov $8, %cx
1:  rol $4, %ebx
    mov %bl, %al
    and $15, %al
    add $'0', %al
    cmp $'9', %al
    jbe 2f
    add $'a' - '9' - 1, %al
2:  out %al, $DEBUGCON
    loop 1b
    mov $'\n', %al
    out %al, $DEBUGCON
    ret

    .balign 4
packet:
    .byte 16, 0
    .word CHUNK, 0, SEGMENT
lba:
    .quad 0
sum:
    .long 0
drive:
    .byte 0

    .org SECTOR - 2
    .word 0xaa55

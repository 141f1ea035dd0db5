/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Snapshot test guest: entry, descriptor tables, interrupt stubs, AP start,
 * and the way into long mode and back
 */

#include "hw/misc/snapshot-regs.h"
#include "layout.h"

#define CR0_PE              (1 << 0)
#define CR0_PG              (1 << 31)
#define CR4_PAE             (1 << 5)
#define MSR_EFER            0xc0000080
#define EFER_LME            (1 << 8)

    .section .multiboot, "a"
    .long 0x1badb002                    /* magic */
    .long 2                             /* flags: pass the memory's size */
    .long -(0x1badb002 + 2)             /* checksum */

    .text
    .code32
    .globl start
start:
    cli
    cld
    mov $stack_top, %esp
    lgdt gdt_pointer
    ljmp $SEL_CODE32, $1f
1:  mov $SEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    push %ebx                           /* multiboot information */
    call guest_main
    ud2

/* One stub a vector; each leaves a struct frame on the stack. */
    .globl irq_stubs
    .balign 16
irq_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17)
    push $0                             /* no error code from the CPU */
    .endif
    push $vector
    jmp irq_common
    .set vector, vector + 1
    .endr

irq_common:
    pushal
    cld
    push %esp
    call irq_dispatch
    add $4, %esp
    popal
    add $8, %esp                        /* vector, error code */
    iret

/*
 * Where a SIPI starts an AP, copied to AP_TRAMPOLINE. Real mode; %cs is the
 * trampoline's page.
 */
    .globl ap_trampoline, ap_trampoline_end
    .code16
ap_trampoline:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl AP_TRAMPOLINE + ap_gdt_pointer - ap_trampoline
    mov %cr0, %eax
    or $CR0_PE, %al
    mov %eax, %cr0
    ljmpl $SEL_CODE32, $ap_start
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_trampoline_end:

    .code32
ap_start:
    mov $SEL_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    mov ap_stack, %esp
    call ap_main
    ud2

/*
 * uint32_t long_mode_call(void (*fn)(void), void *pml4, uint32_t argument)
 *
 * Calls the 64-bit @fn, %edi = argument, with interrupts off and back to
 * 32 bits without paging; returns its %eax.
 */
    .globl long_mode_call
long_mode_call:
    push %ebx
    push %esi
    push %edi
    push %ebp
    mov 20(%esp), %ebx
    mov 28(%esp), %edi
    mov %cr4, %eax
    or $CR4_PAE, %eax
    mov %eax, %cr4
    mov 24(%esp), %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov %cr0, %eax
    or $CR0_PG, %eax
    mov %eax, %cr0
    ljmp $SEL_CODE64, $1f
    .code64
1:  call *%rbx
    ljmp *2f(%rip)
2:  .long long_mode_leave
    .word SEL_CODE32
    .code32
    .globl long_mode_leave
long_mode_leave:
    mov %eax, %ebx
    mov %cr0, %eax
    and $~CR0_PG, %eax
    mov %eax, %cr0
    mov $MSR_EFER, %ecx
    rdmsr
    and $~EFER_LME, %eax
    wrmsr
    mov %cr4, %eax
    and $~CR4_PAE, %eax
    mov %eax, %cr4
    mov %ebx, %eax
    pop %ebp
    pop %edi
    pop %esi
    pop %ebx
    ret

    .data
    .balign 8
    .globl gdt, gdt_end
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            /* SEL_CODE32 */
    .quad 0x00cf93000000ffff            /* SEL_DATA */
    .quad 0x00af9b000000ffff            /* SEL_CODE64 */
    .fill SEL_FREE_COUNT, 8, 0          /* SEL_FREE(n) */
gdt_end:

    .globl gdt_pointer
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .bss
    .balign 4096
    .globl stack_bottom, stack_top
stack_bottom:
    .skip 16384
stack_top:

    .section .note.GNU-stack, "", @progbits

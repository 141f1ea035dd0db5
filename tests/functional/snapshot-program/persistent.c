/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A program with AFL++'s loop around its main(): one process for all inputs
 *
 * PROGRAM is the program's source, UNDO puts back what its main() must not find
 * changed. For afl-cc, which has the two macros.
 */

#define main program_main
#include PROGRAM
#undef main

#ifndef UNDO
#define UNDO
#endif

int main(int argc, char **argv)
{
    int status = 0;

    __AFL_INIT();
    while (__AFL_LOOP(1000)) {
        status = program_main(argc, argv);
        UNDO;
    }
    return status;
}

/* Hide instruction sets from a process: LD_PRELOAD=narrow_processor.so NARROW_PROCESSOR=avx2.

The runtimes ask the instruction CPUID which instruction sets the processor has, and choose their
kernels by that. Here it raises a signal instead, and the handler answers with the processor's own
answer, less the hidden sets. The hidden instructions still work: a program that was compiled for
them uses them all the same. So does the C library's own choice of memcpy and the like, which is
made before this library is loaded.

It needs Linux on an x86 processor whose line `flags` in /proc/cpuinfo has cpuid_fault; elsewhere
the process ends at once, with one line. A program that installs its own handler of SIGSEGV ends at
its next CPUID.

Sources: ARCH_SET_CPUID in arch_prctl(2) of the Linux manual; CPUID leaf 7 in Intel's Software
Developer's Manual, volume 2A. */

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(number) (1u << (number))

struct sets { /* Bits of leaf 7: of its subleaf 0, and of its subleaf 1. */
    unsigned ebx0, ecx0, edx0, eax1, edx1;
};

/* AVX-512 as the servers of 2021 have it, with VNNI. */
static const struct sets avx512 = {
    .ebx0 = BIT(16) | BIT(17) | BIT(21)   /* AVX512F, DQ, IFMA */
            | BIT(26) | BIT(27)           /* PF, ER */
            | BIT(28) | BIT(30) | BIT(31), /* CD, BW, VL */
    .ecx0 = BIT(1) | BIT(6)               /* VBMI, VBMI2 */
            | BIT(11) | BIT(12) | BIT(14), /* VNNI, BITALG, VPOPCNTDQ */
    .edx0 = BIT(2) | BIT(3) | BIT(8),     /* 4VNNIW, 4FMAPS, VP2INTERSECT */
};

/* What came after it. */
static const struct sets newer = {
    .edx0 = BIT(22) | BIT(24) | BIT(25)   /* AMX-BF16, AMX-TILE, AMX-INT8 */
            | BIT(23),                    /* AVX512-FP16 */
    .eax1 = BIT(4) | BIT(5)               /* AVX-VNNI, AVX512-BF16 */
            | BIT(21) | BIT(23),          /* AMX-FP16, AVX-IFMA */
    .edx1 = BIT(4) | BIT(5) | BIT(10)     /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16 */
            | BIT(8) | BIT(19),           /* AMX-COMPLEX, AVX10 */
};

static struct sets hidden;

static long let_cpuid(int work) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, work); }

static void answer(int number, siginfo_t *signal, void *context) {
    (void)number;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *instruction = (const unsigned char *)registers[REG_RIP];
    /* SI_KERNEL first: for other faults, the instruction need not be readable. */
    if (signal->si_code != SI_KERNEL || instruction[0] != 0x0f || instruction[1] != 0xa2) {
        /* Not CPUID. The instruction is repeated, and then ends the process as it would have. */
        struct sigaction ending = {.sa_handler = SIG_DFL};
        sigaction(SIGSEGV, &ending, NULL);
        return;
    }
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], eax, ebx, ecx, edx;
    /* The kernel keeps this for each thread. */
    let_cpuid(1);
    __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
    let_cpuid(0);
    if (leaf == 7 && subleaf == 0) {
        ebx &= ~hidden.ebx0;
        ecx &= ~hidden.ecx0;
        edx &= ~hidden.edx0;
    } else if (leaf == 7 && subleaf == 1) {
        eax &= ~hidden.eax1;
        edx &= ~hidden.edx1;
    }
    registers[REG_RAX] = eax;
    registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx;
    registers[REG_RDX] = edx;
    registers[REG_RIP] += 2;
}

/* A new thread inherits that CPUID raises a signal; a new program does not, but is preloaded. */
__attribute__((constructor)) static void hide(void) {
    const char *processor = getenv("NARROW_PROCESSOR");
    hidden = newer;
    if (processor && !strcmp(processor, "avx2")) {
        hidden.ebx0 |= avx512.ebx0;
        hidden.ecx0 |= avx512.ecx0;
        hidden.edx0 |= avx512.edx0;
    } else if (!processor || strcmp(processor, "avx512_vnni")) {
        fprintf(stderr, "NARROW_PROCESSOR must be avx2 or avx512_vnni\n");
        _exit(1);
    }
    struct sigaction answering = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO};
    /* Another signal's handler could ask CPUID while it works. */
    sigfillset(&answering.sa_mask);
    if (sigaction(SIGSEGV, &answering, NULL) || let_cpuid(0)) {
        fprintf(stderr, "the kernel can't let CPUID raise a signal (%s)\n", strerror(errno));
        _exit(1);
    }
}

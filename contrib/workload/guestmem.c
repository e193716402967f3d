/*
 * A program that uses memory, for the inside of a test VM.
 *
 *   guestmem touch MIB    touch that much memory, say "ready", keep it until standard input ends
 *   guestmem punch MIB    the same, then free every second 4 KiB page before "ready"
 *   guestmem verify MIB   fill that much with a pattern, say "ready", and check and refill it over and over until
 *                         standard input ends; exit code 1, and a line that says where, if a single word is wrong
 *
 * Memory is mapped in 4 KiB pages (MADV_NOHUGEPAGE), so that what is punched is free at once, and scattered. With
 * "--huge" as the last argument it is left to the kernel, which may use transparent huge pages.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / sizeof(uint64_t))

static void fail(const char *what)
{
    fprintf(stderr, "guestmem: %s: %s\n", what, strerror(errno));
    exit(2);
}

/* Each word differs from its neighbours, from those of other pages, and from those of other rounds. */
static uint64_t word(uint64_t page, uint64_t index, uint64_t round)
{
    uint64_t x = page * 0x9e3779b97f4a7c15ULL + index * 0xbf58476d1ce4e5b9ULL + round * 0x94d049bb133111ebULL;
    return x ^ (x >> 31) ^ 1;
}

static void fill_page(uint64_t *at, uint64_t page, uint64_t round)
{
    for (uint64_t i = 0; i < WORDS; i++)
        at[i] = word(page, i, round);
}

static uint64_t wrong_words(const uint64_t *at, uint64_t page, uint64_t round)
{
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < WORDS; i++)
        wrong += at[i] != word(page, i, round);
    return wrong;
}

/* Whether standard input has ended; what comes on it is thrown away. Waits at most "timeout" milliseconds. */
static int input_ended(int timeout)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};
    char buffer[256];
    if (poll(&input, 1, timeout) <= 0)
        return 0;
    return read(0, buffer, sizeof(buffer)) <= 0;
}

static int verify(uint64_t *memory, uint64_t pages)
{
    uint64_t bad_pages = 0, round = 0;
    for (uint64_t p = 0; p < pages; p++)
        fill_page(memory + p * WORDS, p, round);
    puts("ready");
    fflush(stdout);
    int ended = 0;
    while (!ended) {
        ended = input_ended(0);
        for (uint64_t p = 0; p < pages; p++) {
            uint64_t *at = memory + p * WORDS;
            uint64_t wrong = wrong_words(at, p, round);
            if (wrong && bad_pages++ < 20)
                printf("CORRUPT page %lu of %lu, round %lu: %lu words wrong, first is %016lx\n", p, pages, round, wrong, at[0]);
            fill_page(at, p, round + 1);
        }
        round++;
    }
    printf("rounds %lu pages %lu corrupt %lu\n", round, pages, bad_pages);
    return bad_pages != 0;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: guestmem touch|punch|verify MIB [--huge]\n");
        return 2;
    }
    size_t size = strtoul(argv[2], NULL, 10) << 20;
    uint64_t pages = size / PAGE;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    int huge = argc > 3 && strcmp(argv[3], "--huge") == 0;
    if (!huge && madvise(memory, size, MADV_NOHUGEPAGE) != 0)
        fail("madvise(MADV_NOHUGEPAGE)");
    if (strcmp(argv[1], "verify") == 0)
        return verify((uint64_t *)memory, pages);
    for (uint64_t p = 0; p < pages; p++)
        *(volatile uint64_t *)(memory + p * PAGE) = p + 1;
    if (strcmp(argv[1], "punch") == 0) {
        for (uint64_t p = 0; p < pages; p += 2)
            if (madvise(memory + p * PAGE, PAGE, MADV_DONTNEED) != 0)
                fail("madvise(MADV_DONTNEED)");
    } else if (strcmp(argv[1], "touch") != 0) {
        fprintf(stderr, "guestmem: unknown mode %s\n", argv[1]);
        return 2;
    }
    puts("ready");
    fflush(stdout);
    while (!input_ended(-1))
        ;
    return 0;
}

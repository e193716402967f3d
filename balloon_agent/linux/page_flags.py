"""Flags of /proc/kpageflags: include/uapi/linux/kernel-page-flags.h, and fs/proc/page.c for RESERVED."""

KPF_SLAB, KPF_BUDDY, KPF_COMPOUND_TAIL, KPF_HUGE, KPF_NOPAGE = 1 << 7, 1 << 10, 1 << 16, 1 << 17, 1 << 20
KPF_THP, KPF_PGTABLE, KPF_RESERVED = 1 << 22, 1 << 26, 1 << 32

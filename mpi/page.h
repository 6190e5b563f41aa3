/* The page that the ranks of a capsule share with the capsule's init, which is outside the checkpoint.
 * The layout is that of hpccr/noded/quiesce.py and hpccr/mpi/page.py; the protocol: docs/internals/quiesce.md. */
#ifndef HPCCR_PAGE_H
#define HPCCR_PAGE_H

#include <stdatomic.h>
#include <stdint.h>

#define HPCCR_PAGE "/dev/shm/hpccr-quiesce"
#define HPCCR_MAGIC UINT64_C(0x3230514343504848)
#define HPCCR_ENTRIES 1024

enum { ENTRY_FREE = 0, ENTRY_ACTIVE = 1, ENTRY_GONE = 2 };

/* One rank in one group of ranks. The first cache line is written once, the second at every safe point. */
struct entry {
	uint64_t group;
	_Atomic uint32_t pid;
	uint32_t size, rank, world;
	_Atomic uint32_t state;
	uint32_t unused[9];
	_Atomic uint64_t count;    /* safe points come to; by the rank, as all up to `finished` */
	_Atomic uint64_t waiting;  /* the question that it has seen, at safe point `count` */
	_Atomic uint64_t arrived;  /* the question for which it stands at its target */
	_Atomic uint64_t finished; /* the question for which traffic and hooks are done */
	_Atomic uint64_t target;   /* by init: the safe point to stop at; 0: none */
	_Atomic uint64_t pending;  /* messages to this rank that it has not received */
	_Atomic uint64_t left;     /* 0 while this is the group of its newest safe point, else 1 + all it had come to then */
	_Atomic uint64_t gap;      /* the most safe points of other groups between two of this one */
};

struct page {
	_Atomic uint64_t magic;
	_Atomic uint64_t claimed; /* entries in use, from the first */
	uint64_t unused[6];
	/* By init only, each the number of a question, from 1 on; a line of its own that ranks only read. */
	_Atomic uint64_t asked;
	_Atomic uint64_t ended;
	_Atomic uint64_t outcomes[2]; /* of the newest questions that ended: of an even one, of an odd one */
	_Atomic uint64_t targeted;
	_Atomic uint64_t go;
	_Atomic uint64_t restarts; /* not a question: how often this page has been restored */
	_Atomic uint64_t patience; /* nor this: milliseconds that traffic is waited for without progress */
	uint64_t unused2[4096 / 8 - 16];
	struct entry entries[HPCCR_ENTRIES];
};

_Static_assert(sizeof(struct entry) == 128, "layout");
_Static_assert(sizeof(struct page) == 4096 + 128 * HPCCR_ENTRIES, "layout");

/* The page of this capsule; outside of one, or if there can be none, a private one in which nothing is ever asked. */
struct page *hpccr_page(void);

/* An entry of the page for this process, in state ENTRY_FREE; a private one if there is none left, and a word about that on
 * stderr. first: it is the first of this process. NULL: no memory. */
struct entry *hpccr_claim(struct page *page, int first);

#endif

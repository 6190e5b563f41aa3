#define _GNU_SOURCE
#include "page.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static struct page nobody_asks;

/* The variable alone does not tell: sbatch takes it along into other jobs. Its value neither: mpirun gives all its ranks
 * its own environment, on whichever capsule they are. */
static int in_capsule(void)
{
	const char *index = getenv("HPCCR_CAPSULE");
	char host[256] = "";
	int number, end = 0;

	if (!index || !*index || gethostname(host, sizeof host - 1) != 0)
		return 0;
	return sscanf(host, "hpccr-%d%n", &number, &end) == 1 && !host[end];
}

struct page *hpccr_page(void)
{
	struct page *page;
	uint64_t magic = 0;
	int fd;

	if (!in_capsule())
		return &nobody_asks;
	fd = open(HPCCR_PAGE, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return &nobody_asks;
	if (ftruncate(fd, sizeof *page) != 0) {
		close(fd);
		return &nobody_asks;
	}
	page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (page == MAP_FAILED)
		return &nobody_asks;
	if (!atomic_compare_exchange_strong(&page->magic, &magic, HPCCR_MAGIC) && magic != HPCCR_MAGIC) {
		fprintf(stderr, "hpccr: safe points are without effect: %s was made by another version of hpccr's MPI library\n",
			HPCCR_PAGE);
		munmap(page, sizeof *page);
		return &nobody_asks;
	}
	return page;
}

/* A name in the capsule's network namespace that one process can have at a time, and loses when it dies. A file lock would
 * do as well, but CRIU refuses processes that hold one. */
static int lock(void)
{
	static const char name[] = "\0hpccr-claim";
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timespec pause = {0, 500000};
	int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	memcpy(address.sun_path, name, sizeof name - 1);
	while (fd >= 0 && bind(fd, (struct sockaddr *)&address,
			       (socklen_t)(offsetof(struct sockaddr_un, sun_path) + sizeof name - 1)) != 0) {
		if (errno != EADDRINUSE) {
			close(fd);
			return -1;
		}
		nanosleep(&pause, NULL);
	}
	return fd;
}

static int in_use(struct entry *entry)
{
	pid_t pid = (pid_t)atomic_load(&entry->pid);

	return pid && (pid == getpid() || kill(pid, 0) == 0 || errno != ESRCH);
}

struct entry *hpccr_claim(struct page *page, int first)
{
	struct entry *entry;
	uint64_t claimed, place;
	int fd;

	if (page == &nobody_asks || (fd = lock()) < 0)
		return calloc(1, sizeof *entry);
	claimed = atomic_load(&page->claimed);
	/* Of one that had this process's number and died without MPI_Finalize. */
	for (place = 0; first && place < claimed && place < HPCCR_ENTRIES; place++)
		if ((pid_t)atomic_load(&page->entries[place].pid) == getpid())
			atomic_store(&page->entries[place].pid, 0);
	for (place = 0; place < claimed && place < HPCCR_ENTRIES && in_use(&page->entries[place]); place++)
		;
	if (place < HPCCR_ENTRIES) {
		entry = &page->entries[place];
		atomic_store(&entry->state, ENTRY_FREE);
		atomic_store(&entry->pid, (uint32_t)getpid());
		atomic_store(&entry->count, 0);
		atomic_store(&entry->target, 0);
		atomic_store(&entry->waiting, 0);
		atomic_store(&entry->arrived, 0);
		atomic_store(&entry->finished, 0);
		atomic_store(&entry->pending, 0);
		atomic_store(&entry->left, 0);
		atomic_store(&entry->gap, 0);
		if (place == claimed)
			atomic_store(&page->claimed, claimed + 1);
	} else {
		entry = calloc(1, sizeof *entry);
		fprintf(stderr, "hpccr: %d sets of communicators times ranks have safe points on this node; those of one more "
				"cannot be waited for by checkpoints\n", HPCCR_ENTRIES);
	}
	close(fd);
	return entry;
}

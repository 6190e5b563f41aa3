/* Safe points: where the ranks of a communicator stand still while the job is frozen. docs/internals/quiesce.md. */
#define _GNU_SOURCE
#include "hpccr_mpi.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "page.h"
#include "traffic.h"

/* Ranks that call together, whichever of their communicators they do it on. */
struct group {
	MPI_Comm own;     /* an intra-communicator of all of them, for nobody but us */
	MPI_Group ranks;  /* of `own` */
	struct entry *entry;
	struct group *next;
};

struct hook {
	hpccr_hook *function;
	void *argument;
	struct hook *next;
};

static struct page *page;
static struct group *groups;
static int group_key = MPI_KEYVAL_INVALID;
static MPI_Comm last_comm = MPI_COMM_NULL;
static struct group *last_group;
static uint64_t handled;  /* the newest question that this process is done with */
static uint64_t restarts; /* those it has heard of */
static struct hook *quiesce_hooks, *resume_hooks, *restart_hooks;

static int forget(MPI_Comm comm, int key, void *value, void *extra)
{
	(void)key, (void)value, (void)extra;
	if (comm == last_comm)
		last_group = NULL;
	return MPI_SUCCESS;
}

static void pause_(unsigned *turn)
{
	struct timespec pause = {0, *turn < 20 ? 100000 : 1000000};

	++*turn;
	nanosleep(&pause, NULL);
}

/* Let MPI work on what is under way: peers on their way to the safe point may wait for it. */
static void progress(MPI_Comm comm)
{
	int flag;

	PMPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm, &flag, MPI_STATUS_IGNORE);
}

static struct group *find_group(MPI_Group ranks)
{
	struct group *group;
	int result;

	for (group = groups; group; group = group->next)
		if (PMPI_Group_compare(group->ranks, ranks, &result) == MPI_SUCCESS &&
		    (result == MPI_IDENT || result == MPI_SIMILAR))
			return group;
	return NULL;
}

/* First call on a communicator: all its ranks are here. */
static struct group *enter(MPI_Comm comm)
{
	MPI_Comm own = MPI_COMM_NULL;
	MPI_Group ranks;
	struct group *group;
	int inter, rank, size, world = -1;
	uint64_t name = 0;

	if (!page)
		page = hpccr_page();
	if (group_key == MPI_KEYVAL_INVALID &&
	    PMPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, forget, &group_key, NULL) != MPI_SUCCESS)
		return NULL;
	if (PMPI_Comm_test_inter(comm, &inter) != MPI_SUCCESS)
		return NULL;
	if (inter && PMPI_Intercomm_merge(comm, 0, &own) != MPI_SUCCESS)
		return NULL;
	PMPI_Comm_group(inter ? own : comm, &ranks);
	group = find_group(ranks);
	if (group) {
		PMPI_Group_free(&ranks);
		if (inter)
			PMPI_Comm_free(&own);
	} else {
		if (!inter && PMPI_Comm_dup(comm, &own) != MPI_SUCCESS)
			return NULL;
		group = calloc(1, sizeof *group);
		if (!group)
			return NULL;
		PMPI_Comm_rank(own, &rank);
		PMPI_Comm_size(own, &size);
		PMPI_Comm_rank(MPI_COMM_WORLD, &world);
		if (rank == 0 && getrandom(&name, sizeof name, 0) != sizeof name)
			name = (uint64_t)time(NULL) << 20 | (uint64_t)getpid();
		PMPI_Bcast(&name, 1, MPI_UINT64_T, 0, own);
		group->own = own;
		group->ranks = ranks;
		group->entry = hpccr_claim(page, !groups);
		if (!group->entry)
			abort();
		group->entry->group = name;
		group->entry->size = (uint32_t)size;
		group->entry->rank = (uint32_t)rank;
		group->entry->world = (uint32_t)world;
		atomic_store(&group->entry->state, ENTRY_ACTIVE);
		/* After that: a question from now on finds the entry. */
		if (!groups) {
			handled = atomic_load(&page->ended);
			restarts = atomic_load(&page->restarts);
		}
		group->next = groups;
		groups = group;
	}
	PMPI_Comm_set_attr(comm, group_key, group);
	return group;
}

/* A safe point of another group than the last one. */
static void change(struct group *to)
{
	struct group *group;
	uint64_t all = 1, left = atomic_load(&to->entry->left);

	for (group = groups; group; group = group->next)
		all += atomic_load(&group->entry->count);
	for (group = groups; group; group = group->next)
		if (group != to && !atomic_load(&group->entry->left))
			atomic_store(&group->entry->left, all);
	if (left && all - left > atomic_load(&to->entry->gap))
		atomic_store(&to->entry->gap, all - left);
	atomic_store(&to->entry->left, 0);
}

static void call_all(struct hook *hook)
{
	for (; hook; hook = hook->next)
		hook->function(hook->argument);
}

static int outcome_of(uint64_t question)
{
	return (int)atomic_load(&page->outcomes[question % 2]);
}

/* A question is open. Stand still until there is an answer, and if this is the safe point that was agreed on, until the
 * checkpoint is over. Gives what became of it, HPCCR_NOTHING if this rank did not stand meanwhile. quiesced: whether the
 * hooks of on_quiesce have run. */
static int stop(struct group *group, uint64_t count, int *quiesced)
{
	struct entry *entry = group->entry;
	unsigned turn = 0;
	uint64_t asked, ended;
	int outcome = HPCCR_NOTHING;

	while ((asked = atomic_load(&page->asked)) != handled) {
		/* Which safe point it is to be is decided in a moment, without waiting for any rank. */
		atomic_store(&entry->waiting, asked);
		if (atomic_load(&page->ended) >= asked) {
			handled = asked;
			outcome = turn ? outcome_of(asked) : HPCCR_NOTHING;
			continue;
		}
		if (atomic_load(&page->targeted) == asked)
			break;
		progress(group->own);
		pause_(&turn);
	}
	if (asked == handled || atomic_load(&entry->target) != count)
		return outcome;
	atomic_store(&entry->arrived, asked);
	for (turn = 0;;) {
		/* In this order: `go` comes before `ended`, and all take part in what follows or none. */
		ended = atomic_load(&page->ended);
		if (atomic_load(&page->go) == asked)
			break;
		if (ended >= asked) {
			handled = asked;
			return outcome_of(asked);
		}
		progress(group->own);
		pause_(&turn);
	}
	atomic_store(&entry->pending, hpccr_drain(group->own, atomic_load(&page->patience)));
	call_all(quiesce_hooks);
	*quiesced = 1;
	atomic_store(&entry->finished, asked);
	for (turn = 0; atomic_load(&page->ended) < asked;)
		pause_(&turn);
	handled = asked;
	return outcome_of(asked);
}

/* Something has been asked, or the program was restored. */
static int answer(struct group *group, uint64_t count)
{
	int quiesced = 0, outcome = HPCCR_NOTHING;
	uint64_t known;

	if (atomic_load(&page->asked) != handled)
		outcome = stop(group, count, &quiesced);
	/* Every rank hears of every restart, wherever it was at the checkpoint. */
	known = atomic_load(&page->restarts);
	if (known != restarts) {
		restarts = known;
		outcome = HPCCR_RESTARTED;
		call_all(restart_hooks);
	} else if (quiesced) {
		call_all(resume_hooks);
	}
	return outcome;
}

int hpccr_safe_point(MPI_Comm comm)
{
	struct group *group = last_group;
	uint64_t count;
	int known;

	if (__builtin_expect(!group || comm != last_comm, 0)) {
		known = 0;
		if (comm == MPI_COMM_NULL)
			return -1;
		if (group_key != MPI_KEYVAL_INVALID)
			PMPI_Comm_get_attr(comm, group_key, &group, &known);
		if (!known)
			group = enter(comm);
		if (!group)
			return -1;
		if (groups->next)
			change(group);
		last_comm = comm;
		last_group = group;
	}
	count = atomic_load_explicit(&group->entry->count, memory_order_relaxed) + 1;
	/* First the count, then the look (sequentially consistent): whoever is not seen here has been counted there. */
	atomic_store(&group->entry->count, count);
	if (__builtin_expect(atomic_load(&page->asked) == handled && atomic_load(&page->restarts) == restarts, 1))
		return HPCCR_NOTHING;
	return answer(group, count);
}

static int add(struct hook **first, hpccr_hook *function, void *argument, int front)
{
	struct hook *hook = malloc(sizeof *hook);

	if (!hook)
		return -1;
	hook->function = function;
	hook->argument = argument;
	while (!front && *first)
		first = &(*first)->next;
	hook->next = *first;
	*first = hook;
	return 0;
}

int hpccr_on_quiesce(hpccr_hook *hook, void *argument)
{
	return add(&quiesce_hooks, hook, argument, 1);
}

int hpccr_on_resume(hpccr_hook *hook, void *argument)
{
	return add(&resume_hooks, hook, argument, 0);
}

int hpccr_on_restart(hpccr_hook *hook, void *argument)
{
	return add(&restart_hooks, hook, argument, 0);
}

int hpccr_request_checkpoint(void)
{
	static const char name[] = "\0hpccr-request";
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	ssize_t sent;
	int fd;

	memcpy(address.sun_path, name, sizeof name - 1);
	fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	sent = sendto(fd, "c", 1, MSG_DONTWAIT | MSG_NOSIGNAL, (struct sockaddr *)&address,
		      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + sizeof name - 1));
	if (sent < 0 && errno == EAGAIN)
		sent = 0; /* so many wishes are waiting already */
	if (sent < 0)
		errno = ENOTCONN;
	close(fd);
	return sent < 0 ? -1 : 0;
}

int MPI_Finalize(void)
{
	struct group *group;

	for (group = groups; group; group = group->next)
		atomic_store(&group->entry->state, ENTRY_GONE);
	return PMPI_Finalize();
}

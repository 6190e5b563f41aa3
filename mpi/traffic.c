/* The books of messages, and the drain that closes them. What is written into them, and when: pmpi.c. */
#define _GNU_SOURCE
#include "traffic.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Looks without any news after which what is missing counts as not received by the program, 0.2 ms apart. Counted, not
 * timed: a rank that the kernel has not let run has not looked. */
#define STILL 1000
#define BUCKETS 1024

/* What has gone by on communicators with these peers. Those of a communicator that is freed are added to another of the
 * same peers, or kept. */
struct ledger {
	MPI_Comm comm;
	MPI_Group peers;
	int size;
	uint64_t *sent, *received;
	uint64_t *unseen; /* at the last drain on this communicator: messages counted as sent of which there was no trace */
	int outstanding;  /* receives that are in the table */
	int open;         /* its communicator is */
	struct ledger *next;
};

/* A receive (or persistent send) that has been started, or can be. */
struct post {
	MPI_Request request;
	struct ledger *ledger;
	int peer; /* of a persistent send, else -1 */
	int persistent, active, counted;
	struct post *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* Of those who open a ledger; taken before `lock`. MPI is called with it, and may call closed(). */
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static struct ledger *ledgers;
static struct post *posts[BUCKETS];
static int posted;
static int ledger_key = MPI_KEYVAL_INVALID;

static void add_up(uint64_t *counter)
{
	__atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

/* --- per communicator --------------------------------------------------------------------------------------------- */

static int closed(MPI_Comm comm, int key, void *value, void *extra)
{
	struct ledger *ledger = value, **link, *other;
	int result, i;

	(void)comm, (void)key, (void)extra;
	pthread_mutex_lock(&lock);
	ledger->open = 0;
	if (ledger->outstanding)
		goto done;
	for (other = ledgers; other; other = other->next) {
		if (other == ledger || other->size != ledger->size ||
		    PMPI_Group_compare(other->peers, ledger->peers, &result) != MPI_SUCCESS || result != MPI_IDENT)
			continue;
		for (i = 0; i < ledger->size; i++) {
			other->sent[i] += ledger->sent[i];
			other->received[i] += ledger->received[i];
		}
		for (link = &ledgers; *link != ledger; link = &(*link)->next)
			;
		*link = ledger->next;
		PMPI_Group_free(&ledger->peers);
		free(ledger->sent);
		free(ledger);
		break;
	}
done:
	pthread_mutex_unlock(&lock);
	return MPI_SUCCESS;
}

/* The first message on a communicator. Several threads may come here at once, each with one of its own. */
static struct ledger *open_ledger(MPI_Comm comm)
{
	struct ledger *ledger = NULL;
	int known = 0, inter, key;

	pthread_mutex_lock(&opening);
	key = ledger_key;
	if (key == MPI_KEYVAL_INVALID) {
		PMPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, closed, &key, NULL);
		__atomic_store_n(&ledger_key, key, __ATOMIC_RELEASE);
	}
	if (PMPI_Comm_get_attr(comm, key, &ledger, &known) == MPI_SUCCESS && known)
		goto done;
	ledger = calloc(1, sizeof *ledger);
	if (!ledger)
		abort();
	PMPI_Comm_test_inter(comm, &inter);
	if (inter)
		PMPI_Comm_remote_group(comm, &ledger->peers);
	else
		PMPI_Comm_group(comm, &ledger->peers);
	PMPI_Group_size(ledger->peers, &ledger->size);
	ledger->sent = calloc(3 * (size_t)ledger->size + 1, sizeof *ledger->sent);
	if (!ledger->sent)
		abort();
	ledger->received = ledger->sent + ledger->size;
	ledger->unseen = ledger->received + ledger->size;
	ledger->comm = comm;
	ledger->open = 1;
	pthread_mutex_lock(&lock);
	ledger->next = ledgers;
	ledgers = ledger;
	pthread_mutex_unlock(&lock);
	PMPI_Comm_set_attr(comm, key, ledger);
done:
	pthread_mutex_unlock(&opening);
	return ledger;
}

static struct ledger *ledger_of(MPI_Comm comm)
{
	struct ledger *ledger = NULL;
	int known = 0, key = __atomic_load_n(&ledger_key, __ATOMIC_ACQUIRE);

	if (key != MPI_KEYVAL_INVALID)
		PMPI_Comm_get_attr(comm, key, &ledger, &known);
	return known ? ledger : open_ledger(comm);
}

void hpccr_sent(int peer, MPI_Comm comm)
{
	if (peer >= 0)
		add_up(&ledger_of(comm)->sent[peer]);
}

void hpccr_received(const MPI_Status *status, MPI_Comm comm)
{
	if (status->MPI_SOURCE >= 0)
		add_up(&ledger_of(comm)->received[status->MPI_SOURCE]);
}

/* --- requests ----------------------------------------------------------------------------------------------------- */

static struct post **bucket(MPI_Request request)
{
	uint64_t bits = 0;

	memcpy(&bits, &request, sizeof request);
	return &posts[(bits * UINT64_C(0x9E3779B97F4A7C15)) >> 54];
}

/* With the lock. */
static struct post **find(MPI_Request request)
{
	struct post **link = bucket(request);

	while (*link && (*link)->request != request)
		link = &(*link)->next;
	return link;
}

/* With the lock. Last in its bucket: another thread may not have said yet that its request, whose handle this now is, is
 * complete. */
static void append(struct post *item)
{
	struct post **link;

	for (link = bucket(item->request); *link; link = &(*link)->next)
		;
	item->next = NULL;
	*link = item;
}

void hpccr_post(MPI_Request handle, MPI_Comm comm, int peer, int persistent)
{
	struct post *new;

	if (handle == MPI_REQUEST_NULL)
		return;
	new = calloc(1, sizeof *new);
	if (!new)
		abort();
	new->request = handle;
	new->ledger = ledger_of(comm);
	new->peer = peer;
	new->persistent = persistent;
	new->active = !persistent;
	pthread_mutex_lock(&lock);
	append(new);
	new->ledger->outstanding++;
	posted++;
	pthread_mutex_unlock(&lock);
}

/* With the lock. status: NULL if there is none to be trusted. */
static void count(struct post *item, const MPI_Status *status)
{
	int cancelled = 0;

	if (item->peer >= 0 || item->counted || !item->active)
		return;
	if (status) {
		PMPI_Test_cancelled(status, &cancelled);
		if (!cancelled && status->MPI_SOURCE >= 0)
			add_up(&item->ledger->received[status->MPI_SOURCE]);
	}
	item->counted = 1;
}

/* With the lock. */
static void drop(struct post **link)
{
	struct post *item = *link;

	*link = item->next;
	item->ledger->outstanding--;
	posted--;
	free(item);
}

void hpccr_completed(MPI_Request before, const MPI_Status *status)
{
	struct post **link;

	if (before == MPI_REQUEST_NULL)
		return;
	pthread_mutex_lock(&lock);
	link = find(before);
	if (*link) {
		count(*link, status);
		if ((*link)->persistent)
			(*link)->active = (*link)->counted = 0;
		else
			drop(link);
	}
	pthread_mutex_unlock(&lock);
}

void hpccr_started(MPI_Request before, MPI_Request after)
{
	struct post **link, *item;

	pthread_mutex_lock(&lock);
	link = find(before);
	item = *link;
	if (item) {
		if (before != after) {
			*link = item->next;
			item->request = after;
			append(item);
		}
		item->active = 1;
		item->counted = 0;
		if (item->peer >= 0)
			add_up(&item->ledger->sent[item->peer]);
	}
	pthread_mutex_unlock(&lock);
}

void hpccr_freed(MPI_Request request)
{
	struct post **link;

	pthread_mutex_lock(&lock);
	link = find(request);
	if (*link)
		drop(link);
	pthread_mutex_unlock(&lock);
}

int hpccr_anything_posted(void)
{
	return __atomic_load_n(&posted, __ATOMIC_RELAXED) != 0;
}

/* --- the drain ---------------------------------------------------------------------------------------------------- */

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void total(MPI_Group all, int size, uint64_t *sums, int of_sent)
{
	struct ledger *ledger;
	int i;

	memset(sums, 0, (size_t)size * sizeof *sums);
	for (ledger = ledgers; ledger; ledger = ledger->next) {
		int *theirs = malloc(2 * (size_t)ledger->size * sizeof *theirs + 1), *ours = theirs + ledger->size;

		if (!theirs)
			abort();
		for (i = 0; i < ledger->size; i++)
			theirs[i] = i;
		PMPI_Group_translate_ranks(ledger->peers, ledger->size, theirs, all, ours);
		for (i = 0; i < ledger->size; i++)
			if (ours[i] >= 0 && ours[i] < size)
				sums[ours[i]] += of_sent ? ledger->sent[i] : ledger->received[i];
		free(theirs);
	}
}

/* With the lock: count the receives that are complete though the program has not looked at them yet. Gives those that are
 * not complete. */
static int look(void)
{
	int i, waiting = 0;

	for (i = 0; i < BUCKETS; i++) {
		struct post *item;

		for (item = posts[i]; item; item = item->next) {
			MPI_Status status;
			int flag = 0;

			if (item->peer >= 0 || !item->active || item->counted)
				continue;
			if (PMPI_Request_get_status(item->request, &flag, &status) == MPI_SUCCESS && flag)
				count(item, &status);
			else
				waiting++;
		}
	}
	return waiting;
}

/* With the lock: whether a message of that rank of `ranks` lies here, on any communicator, for which no receive is posted. */
static int lies_here(MPI_Group ranks, int rank)
{
	struct ledger *ledger;
	int flag = 0, peer;

	for (ledger = ledgers; ledger && !flag; ledger = ledger->next) {
		if (!ledger->open)
			continue;
		PMPI_Group_translate_ranks(ranks, 1, &rank, ledger->peers, &peer);
		if (peer != MPI_UNDEFINED)
			PMPI_Iprobe(peer, MPI_ANY_TAG, ledger->comm, &flag, MPI_STATUS_IGNORE);
	}
	return flag;
}

/* With the lock: what is still missing, by peer, once nothing moves any more. Messages that are certainly not under way are
 * written off, in the ledger of the communicator of the drain, which carries no messages of its own: more received than
 * sent, or twice in turn as many sent that are nowhere to be found. Else one message that is counted at one end only (a
 * Fortran caller's, a request that was freed) would keep the program from being quiescent for good. */
static uint64_t missing_messages(struct ledger *books, MPI_Group ranks, const uint64_t *theirs, const uint64_t *sums)
{
	uint64_t missing = 0;
	int64_t written_off = 0;
	int i;

	for (i = 0; i < books->size; i++) {
		int64_t lack = (int64_t)(theirs[i] - sums[i]);
		int unseen = lack > 0 && !lies_here(ranks, i);

		if (lack < 0 || (unseen && books->unseen[i] == (uint64_t)lack)) {
			books->received[i] += (uint64_t)lack;
			books->unseen[i] = 0;
			written_off += lack < 0 ? -lack : lack;
			continue;
		}
		books->unseen[i] = unseen ? (uint64_t)lack : 0;
		missing += (uint64_t)lack;
	}
	if (written_off)
		fprintf(stderr,
			"hpccr: %lld messages were counted at one end only (sent or received by Fortran, or by a request that "
			"was freed, cancelled or failed), and are left out from now on\n",
			(long long)written_off);
	return missing;
}

uint64_t hpccr_drain(MPI_Comm all, uint64_t patience)
{
	struct ledger *books = ledger_of(all);
	MPI_Group ranks;
	uint64_t *theirs, *sums, missing, before = UINT64_MAX;
	double start = now();
	int size, i, flag, waiting, still = 0, done = 0;
	MPI_Request everyone = MPI_REQUEST_NULL;

	PMPI_Comm_size(all, &size);
	PMPI_Comm_group(all, &ranks);
	theirs = calloc(2 * (size_t)size, sizeof *theirs);
	if (!theirs)
		abort();
	sums = theirs + size;
	pthread_mutex_lock(&lock);
	total(ranks, size, sums, 1);
	/* What each has sent to this one. All ranks stand here, so nobody sends any more. */
	PMPI_Alltoall(sums, 1, MPI_UINT64_T, theirs, 1, MPI_UINT64_T, all);
	for (;;) {
		struct timespec pause = {0, 200000};

		PMPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, all, &flag, MPI_STATUS_IGNORE);
		waiting = look();
		total(ranks, size, sums, 0);
		for (missing = 0, i = 0; i < size; i++)
			missing += theirs[i] > sums[i] ? theirs[i] - sums[i] : 0;
		still = missing == before ? still + 1 : 0;
		before = missing;
		/* Whoever has all it was sent helps the others until they have, or give up. Where a receive is posted, what
		 * is missing may be one large message, of which nothing is seen before it is complete. */
		if (everyone == MPI_REQUEST_NULL && !done &&
		    (!missing || (still >= STILL && (!waiting || (now() - start) * 1e3 >= (double)patience))))
			PMPI_Ibarrier(all, &everyone);
		if (everyone != MPI_REQUEST_NULL)
			PMPI_Test(&everyone, &done, MPI_STATUS_IGNORE);
		if (done)
			break;
		nanosleep(&pause, NULL);
	}
	missing = missing_messages(books, ranks, theirs, sums);
	pthread_mutex_unlock(&lock);
	PMPI_Group_free(&ranks);
	free(theirs);
	return missing;
}

uint64_t hpccr_drain_at(MPI_Comm *all, uint64_t patience)
{
	return hpccr_drain(*all, patience);
}

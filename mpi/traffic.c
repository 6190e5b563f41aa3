/* Messages are counted where MPI's profiling interface shows them: a send when it is started, a receive when it is complete
 * (a matched probe when it has matched). Not counted, on both sides alike: collectives, one-sided and partitioned traffic. */
#define _GNU_SOURCE
#include "traffic.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define STILL 0.2 /* seconds without any progress after which what is missing counts as not received by the program */
#define FEW 64    /* requests for which a call needs no memory from the heap */
#define BUCKETS 1024

/* What has gone by on communicators with these peers. Those of a communicator that is freed are added to another of the
 * same peers, or kept. */
struct ledger {
	MPI_Group peers;
	int size;
	uint64_t *sent, *received;
	int outstanding; /* receives that are in the table */
	int open;        /* its communicator is */
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

static struct ledger *open_ledger(MPI_Comm comm)
{
	struct ledger *ledger = NULL;
	MPI_Group peers;
	int known, inter, size;

	pthread_mutex_lock(&lock);
	if (ledger_key == MPI_KEYVAL_INVALID)
		PMPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, closed, &ledger_key, NULL);
	pthread_mutex_unlock(&lock);
	if (PMPI_Comm_get_attr(comm, ledger_key, &ledger, &known) == MPI_SUCCESS && known)
		return ledger;
	PMPI_Comm_test_inter(comm, &inter);
	if (inter)
		PMPI_Comm_remote_group(comm, &peers);
	else
		PMPI_Comm_group(comm, &peers);
	PMPI_Group_size(peers, &size);
	ledger = calloc(1, sizeof *ledger);
	if (ledger)
		ledger->sent = calloc(2 * (size_t)size + 1, sizeof *ledger->sent);
	if (!ledger || !ledger->sent)
		abort();
	ledger->received = ledger->sent + size;
	ledger->peers = peers;
	ledger->size = size;
	ledger->open = 1;
	PMPI_Comm_set_attr(comm, ledger_key, ledger);
	pthread_mutex_lock(&lock);
	ledger->next = ledgers;
	ledgers = ledger;
	pthread_mutex_unlock(&lock);
	return ledger;
}

static struct ledger *ledger_of(MPI_Comm comm)
{
	struct ledger *ledger = NULL;
	int known = 0;

	if (ledger_key != MPI_KEYVAL_INVALID)
		PMPI_Comm_get_attr(comm, ledger_key, &ledger, &known);
	return known ? ledger : open_ledger(comm);
}

static int sent(int result, int peer, MPI_Comm comm)
{
	if (result == MPI_SUCCESS && peer >= 0)
		add_up(&ledger_of(comm)->sent[peer]);
	return result;
}

static int received(int result, const MPI_Status *status, MPI_Comm comm)
{
	if (result == MPI_SUCCESS && status->MPI_SOURCE >= 0)
		add_up(&ledger_of(comm)->received[status->MPI_SOURCE]);
	return result;
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

static int post(int result, const MPI_Request *handle, MPI_Comm comm, int source, int peer, int persistent)
{
	struct post *new, **link;

	if (result != MPI_SUCCESS || source == MPI_PROC_NULL || *handle == MPI_REQUEST_NULL)
		return result;
	new = calloc(1, sizeof *new);
	if (!new)
		abort();
	new->request = *handle;
	new->ledger = ledger_of(comm);
	new->peer = peer;
	new->persistent = persistent;
	new->active = !persistent;
	pthread_mutex_lock(&lock);
	/* Last: another thread may not have said yet that its request, whose handle this now is, is complete. */
	for (link = bucket(*handle); *link; link = &(*link)->next)
		;
	*link = new;
	new->ledger->outstanding++;
	posted++;
	pthread_mutex_unlock(&lock);
	return result;
}

/* With the lock. */
static void count(struct post *item, const MPI_Status *status)
{
	int cancelled = 0;

	if (item->peer >= 0 || item->counted || !item->active)
		return;
	PMPI_Test_cancelled(status, &cancelled);
	if (!cancelled && status->MPI_SOURCE >= 0)
		add_up(&item->ledger->received[status->MPI_SOURCE]);
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

/* A request as it was before a call that completed it. */
static void completed(MPI_Request request, const MPI_Status *status)
{
	struct post **link;

	if (request == MPI_REQUEST_NULL)
		return;
	pthread_mutex_lock(&lock);
	link = find(request);
	if (*link) {
		count(*link, status);
		if ((*link)->persistent)
			(*link)->active = (*link)->counted = 0;
		else
			drop(link);
	}
	pthread_mutex_unlock(&lock);
}

static void started(MPI_Request request)
{
	struct post *item;

	pthread_mutex_lock(&lock);
	item = *find(request);
	if (item) {
		item->active = 1;
		item->counted = 0;
		if (item->peer >= 0)
			add_up(&item->ledger->sent[item->peer]);
	}
	pthread_mutex_unlock(&lock);
}

static int anything_posted(void)
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

/* With the lock: count the receives that are complete though the program has not looked at them yet. */
static int look(void)
{
	int i, news = 0;

	for (i = 0; i < BUCKETS; i++) {
		struct post *item;

		for (item = posts[i]; item; item = item->next) {
			MPI_Status status;
			int flag = 0;

			if (item->peer >= 0 || !item->active || item->counted ||
			    PMPI_Request_get_status(item->request, &flag, &status) != MPI_SUCCESS || !flag)
				continue;
			count(item, &status);
			news = 1;
		}
	}
	return news;
}

uint64_t hpccr_drain(MPI_Comm all)
{
	MPI_Group ranks;
	uint64_t *theirs, *sums, missing, before = UINT64_MAX;
	double since = now();
	int size, i, flag, done = 0;
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
		look();
		total(ranks, size, sums, 0);
		for (missing = 0, i = 0; i < size; i++)
			missing += theirs[i] > sums[i] ? theirs[i] - sums[i] : sums[i] - theirs[i];
		if (missing != before) {
			before = missing;
			since = now();
		}
		/* Whoever has all it was sent helps the others until they have, or give up. */
		if (everyone == MPI_REQUEST_NULL && !done && (!missing || now() - since > STILL))
			PMPI_Ibarrier(all, &everyone);
		if (everyone != MPI_REQUEST_NULL)
			PMPI_Test(&everyone, &done, MPI_STATUS_IGNORE);
		if (done)
			break;
		nanosleep(&pause, NULL);
	}
	pthread_mutex_unlock(&lock);
	PMPI_Group_free(&ranks);
	free(theirs);
	return missing;
}

uint64_t hpccr_drain_at(MPI_Comm *all)
{
	return hpccr_drain(*all);
}

/* --- MPI's functions ---------------------------------------------------------------------------------------------- */

#define SENDS(name, number)                                                                                            \
	int MPI_##name(const void *buf, number n, MPI_Datatype type, int dest, int tag, MPI_Comm comm)                 \
	{                                                                                                              \
		return sent(PMPI_##name(buf, n, type, dest, tag, comm), dest, comm);                                   \
	}

#define STARTS(name, number)                                                                                           \
	int MPI_##name(const void *buf, number n, MPI_Datatype type, int dest, int tag, MPI_Comm comm, MPI_Request *r) \
	{                                                                                                              \
		return sent(PMPI_##name(buf, n, type, dest, tag, comm, r), dest, comm);                                \
	}

#define PREPARES(name, number)                                                                                         \
	int MPI_##name(const void *buf, number n, MPI_Datatype type, int dest, int tag, MPI_Comm comm, MPI_Request *r) \
	{                                                                                                              \
		return post(PMPI_##name(buf, n, type, dest, tag, comm, r), r, comm, dest, dest, 1);                   \
	}

#define RECEIVES(suffix, number)                                                                                       \
	int MPI_Recv##suffix(void *buf, number n, MPI_Datatype type, int source, int tag, MPI_Comm comm,               \
			     MPI_Status *status)                                                                       \
	{                                                                                                              \
		MPI_Status own;                                                                                        \
                                                                                                                       \
		if (status == MPI_STATUS_IGNORE)                                                                       \
			status = &own;                                                                                 \
		return received(PMPI_Recv##suffix(buf, n, type, source, tag, comm, status), status, comm);             \
	}                                                                                                              \
                                                                                                                       \
	int MPI_Irecv##suffix(void *buf, number n, MPI_Datatype type, int source, int tag, MPI_Comm comm,              \
			      MPI_Request *r)                                                                          \
	{                                                                                                              \
		return post(PMPI_Irecv##suffix(buf, n, type, source, tag, comm, r), r, comm, source, -1, 0);          \
	}                                                                                                              \
                                                                                                                       \
	int MPI_Recv_init##suffix(void *buf, number n, MPI_Datatype type, int source, int tag, MPI_Comm comm,          \
				  MPI_Request *r)                                                                      \
	{                                                                                                              \
		return post(PMPI_Recv_init##suffix(buf, n, type, source, tag, comm, r), r, comm, source, -1, 1);      \
	}                                                                                                              \
                                                                                                                       \
	int MPI_Sendrecv##suffix(const void *out, number nout, MPI_Datatype tout, int dest, int sendtag, void *in,     \
				 number nin, MPI_Datatype tin, int source, int recvtag, MPI_Comm comm,                 \
				 MPI_Status *status)                                                                   \
	{                                                                                                              \
		MPI_Status own;                                                                                        \
		int result;                                                                                            \
                                                                                                                       \
		if (status == MPI_STATUS_IGNORE)                                                                       \
			status = &own;                                                                                 \
		result = PMPI_Sendrecv##suffix(out, nout, tout, dest, sendtag, in, nin, tin, source, recvtag, comm,    \
					       status);                                                                \
		return received(sent(result, dest, comm), status, comm);                                               \
	}                                                                                                              \
                                                                                                                       \
	int MPI_Sendrecv_replace##suffix(void *buf, number n, MPI_Datatype type, int dest, int sendtag, int source,    \
					 int recvtag, MPI_Comm comm, MPI_Status *status)                               \
	{                                                                                                              \
		MPI_Status own;                                                                                        \
		int result;                                                                                            \
                                                                                                                       \
		if (status == MPI_STATUS_IGNORE)                                                                       \
			status = &own;                                                                                 \
		result = PMPI_Sendrecv_replace##suffix(buf, n, type, dest, sendtag, source, recvtag, comm, status);    \
		return received(sent(result, dest, comm), status, comm);                                               \
	}

SENDS(Send, int)
SENDS(Bsend, int)
SENDS(Ssend, int)
SENDS(Rsend, int)
STARTS(Isend, int)
STARTS(Ibsend, int)
STARTS(Issend, int)
STARTS(Irsend, int)
PREPARES(Send_init, int)
PREPARES(Bsend_init, int)
PREPARES(Ssend_init, int)
PREPARES(Rsend_init, int)
RECEIVES(, int)

#if MPI_VERSION >= 4
SENDS(Send_c, MPI_Count)
SENDS(Bsend_c, MPI_Count)
SENDS(Ssend_c, MPI_Count)
SENDS(Rsend_c, MPI_Count)
STARTS(Isend_c, MPI_Count)
STARTS(Ibsend_c, MPI_Count)
STARTS(Issend_c, MPI_Count)
STARTS(Irsend_c, MPI_Count)
PREPARES(Send_init_c, MPI_Count)
PREPARES(Bsend_init_c, MPI_Count)
PREPARES(Ssend_init_c, MPI_Count)
PREPARES(Rsend_init_c, MPI_Count)
RECEIVES(_c, MPI_Count)
#endif

int MPI_Mprobe(int source, int tag, MPI_Comm comm, MPI_Message *message, MPI_Status *status)
{
	MPI_Status own;

	if (status == MPI_STATUS_IGNORE)
		status = &own;
	return received(PMPI_Mprobe(source, tag, comm, message, status), status, comm);
}

int MPI_Improbe(int source, int tag, MPI_Comm comm, int *flag, MPI_Message *message, MPI_Status *status)
{
	MPI_Status own;
	int result;

	if (status == MPI_STATUS_IGNORE)
		status = &own;
	result = PMPI_Improbe(source, tag, comm, flag, message, status);
	return result == MPI_SUCCESS && *flag ? received(result, status, comm) : result;
}

int MPI_Start(MPI_Request *request)
{
	int result = PMPI_Start(request);

	if (result == MPI_SUCCESS && anything_posted())
		started(*request);
	return result;
}

int MPI_Startall(int n, MPI_Request requests[])
{
	int result = PMPI_Startall(n, requests), i;

	for (i = 0; result == MPI_SUCCESS && anything_posted() && i < n; i++)
		started(requests[i]);
	return result;
}

int MPI_Request_free(MPI_Request *request)
{
	struct post **link;

	if (anything_posted()) {
		pthread_mutex_lock(&lock);
		link = find(*request);
		if (*link)
			drop(link);
		pthread_mutex_unlock(&lock);
	}
	return PMPI_Request_free(request);
}

int MPI_Wait(MPI_Request *request, MPI_Status *status)
{
	MPI_Request before = *request;
	MPI_Status own;
	int result;

	if (!anything_posted())
		return PMPI_Wait(request, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	result = PMPI_Wait(request, status);
	if (result == MPI_SUCCESS)
		completed(before, status);
	return result;
}

int MPI_Test(MPI_Request *request, int *flag, MPI_Status *status)
{
	MPI_Request before = *request;
	MPI_Status own;
	int result;

	if (!anything_posted())
		return PMPI_Test(request, flag, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	result = PMPI_Test(request, flag, status);
	if (result == MPI_SUCCESS && *flag)
		completed(before, status);
	return result;
}

/* Handles and statuses of a call on many requests: MPI overwrites the handles, and the caller may want no statuses. */
struct many {
	MPI_Request few[FEW], *before;
	MPI_Status few_statuses[FEW], *statuses;
};

static void prepare(struct many *many, int n, const MPI_Request *requests, MPI_Status *statuses)
{
	size_t size = n > 0 ? (size_t)n : 0;

	many->before = n > FEW ? malloc(size * sizeof *many->before) : many->few;
	many->statuses = statuses != MPI_STATUSES_IGNORE ? statuses
			 : n > FEW                       ? malloc(size * sizeof *many->statuses)
							 : many->few_statuses;
	if (!many->before || !many->statuses)
		abort();
	memcpy(many->before, requests, size * sizeof *requests);
}

static void release(struct many *many, const MPI_Status *statuses)
{
	if (many->before != many->few)
		free(many->before);
	if (many->statuses != many->few_statuses && many->statuses != statuses)
		free(many->statuses);
}

int MPI_Waitall(int n, MPI_Request requests[], MPI_Status statuses[])
{
	struct many many;
	int result, i;

	if (!anything_posted())
		return PMPI_Waitall(n, requests, statuses);
	prepare(&many, n, requests, statuses);
	result = PMPI_Waitall(n, requests, many.statuses);
	for (i = 0; result == MPI_SUCCESS && i < n; i++)
		completed(many.before[i], &many.statuses[i]);
	release(&many, statuses);
	return result;
}

int MPI_Testall(int n, MPI_Request requests[], int *flag, MPI_Status statuses[])
{
	struct many many;
	int result, i;

	if (!anything_posted())
		return PMPI_Testall(n, requests, flag, statuses);
	prepare(&many, n, requests, statuses);
	result = PMPI_Testall(n, requests, flag, many.statuses);
	for (i = 0; result == MPI_SUCCESS && *flag && i < n; i++)
		completed(many.before[i], &many.statuses[i]);
	release(&many, statuses);
	return result;
}

int MPI_Waitany(int n, MPI_Request requests[], int *index, MPI_Status *status)
{
	struct many many;
	MPI_Status own;
	int result;

	if (!anything_posted())
		return PMPI_Waitany(n, requests, index, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	prepare(&many, n, requests, MPI_STATUSES_IGNORE);
	result = PMPI_Waitany(n, requests, index, status);
	if (result == MPI_SUCCESS && *index != MPI_UNDEFINED)
		completed(many.before[*index], status);
	release(&many, MPI_STATUSES_IGNORE);
	return result;
}

int MPI_Testany(int n, MPI_Request requests[], int *index, int *flag, MPI_Status *status)
{
	struct many many;
	MPI_Status own;
	int result;

	if (!anything_posted())
		return PMPI_Testany(n, requests, index, flag, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	prepare(&many, n, requests, MPI_STATUSES_IGNORE);
	result = PMPI_Testany(n, requests, index, flag, status);
	if (result == MPI_SUCCESS && *flag && *index != MPI_UNDEFINED)
		completed(many.before[*index], status);
	release(&many, MPI_STATUSES_IGNORE);
	return result;
}

#define SOME(name)                                                                                                     \
	int MPI_##name(int n, MPI_Request requests[], int *count, int indices[], MPI_Status statuses[])                \
	{                                                                                                              \
		struct many many;                                                                                      \
		int result, i;                                                                                         \
                                                                                                                       \
		if (!anything_posted())                                                                                \
			return PMPI_##name(n, requests, count, indices, statuses);                                     \
		prepare(&many, n, requests, statuses);                                                                 \
		result = PMPI_##name(n, requests, count, indices, many.statuses);                                      \
		for (i = 0; result == MPI_SUCCESS && *count != MPI_UNDEFINED && i < *count; i++)                       \
			completed(many.before[indices[i]], &many.statuses[i]);                                         \
		release(&many, statuses);                                                                              \
		return result;                                                                                         \
	}

SOME(Waitsome)
SOME(Testsome)

/* MPI's functions, as its profiling interface lets us stand in front of them: messages are written into the books where
 * they show, a send when it is started, a receive when it is complete (a matched probe when it has matched). Not counted, on
 * both sides alike: collectives, one-sided and partitioned traffic. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "traffic.h"

#define FEW 64 /* requests for which a call needs no memory from the heap */

static int sent(int result, int peer, MPI_Comm comm)
{
	if (result == MPI_SUCCESS)
		hpccr_sent(peer, comm);
	return result;
}

static int received(int result, const MPI_Status *status, MPI_Comm comm)
{
	if (result == MPI_SUCCESS)
		hpccr_received(status, comm);
	return result;
}

static int post(int result, const MPI_Request *handle, MPI_Comm comm, int source, int peer, int persistent)
{
	if (result == MPI_SUCCESS && source != MPI_PROC_NULL)
		hpccr_post(*handle, comm, peer, persistent);
	return result;
}

/* What a call has made of a request. After an error no status can be trusted; the request is over if its handle is gone.
 * A persistent one stays, and is looked at again by whoever waits for it, or by the drain. */
static void completed(int result, MPI_Request before, MPI_Request after, const MPI_Status *status)
{
	int class = MPI_SUCCESS;

	if (result == MPI_SUCCESS) {
		hpccr_completed(before, status);
		return;
	}
	PMPI_Error_class(result, &class);
	if (class != MPI_ERR_PENDING && after == MPI_REQUEST_NULL)
		hpccr_completed(before, NULL);
}

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

/* One request, whose status is the receive's. */
#define EXCHANGES(suffix, number)                                                                                      \
	int MPI_Isendrecv##suffix(const void *out, number nout, MPI_Datatype tout, int dest, int sendtag, void *in,    \
				  number nin, MPI_Datatype tin, int source, int recvtag, MPI_Comm comm,                \
				  MPI_Request *r)                                                                      \
	{                                                                                                              \
		int result = PMPI_Isendrecv##suffix(out, nout, tout, dest, sendtag, in, nin, tin, source, recvtag,     \
						    comm, r);                                                          \
                                                                                                                       \
		return post(sent(result, dest, comm), r, comm, source, -1, 0);                                         \
	}                                                                                                              \
                                                                                                                       \
	int MPI_Isendrecv_replace##suffix(void *buf, number n, MPI_Datatype type, int dest, int sendtag, int source,   \
					  int recvtag, MPI_Comm comm, MPI_Request *r)                                  \
	{                                                                                                              \
		int result = PMPI_Isendrecv_replace##suffix(buf, n, type, dest, sendtag, source, recvtag, comm, r);    \
                                                                                                                       \
		return post(sent(result, dest, comm), r, comm, source, -1, 0);                                         \
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

/* Open MPI 5 has it, and calls itself MPI 3.1. */
#if MPI_VERSION >= 4 || (defined(OMPI_MAJOR_VERSION) && OMPI_MAJOR_VERSION >= 5)
EXCHANGES(, int)
#endif

#if MPI_VERSION >= 4
EXCHANGES(_c, MPI_Count)
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
	MPI_Request before = *request;
	int result = PMPI_Start(request);

	/* Open MPI gives it another handle if the send before has not left this process yet. */
	if (result == MPI_SUCCESS && hpccr_anything_posted())
		hpccr_started(before, *request);
	return result;
}

int MPI_Request_free(MPI_Request *request)
{
	if (hpccr_anything_posted())
		hpccr_freed(*request);
	return PMPI_Request_free(request);
}

int MPI_Wait(MPI_Request *request, MPI_Status *status)
{
	MPI_Request before = *request;
	MPI_Status own;
	int result;

	if (!hpccr_anything_posted())
		return PMPI_Wait(request, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	result = PMPI_Wait(request, status);
	completed(result, before, *request, status);
	return result;
}

int MPI_Test(MPI_Request *request, int *flag, MPI_Status *status)
{
	MPI_Request before = *request;
	MPI_Status own;
	int result;

	if (!hpccr_anything_posted())
		return PMPI_Test(request, flag, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	result = PMPI_Test(request, flag, status);
	if (result != MPI_SUCCESS || *flag)
		completed(result, before, *request, status);
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
	if (size)
		memcpy(many->before, requests, size * sizeof *requests);
}

static void release(struct many *many, const MPI_Status *statuses)
{
	if (many->before != many->few)
		free(many->before);
	if (many->statuses != many->few_statuses && many->statuses != statuses)
		free(many->statuses);
}

/* After an error: the requests that are gone. With MPI_ERR_IN_STATUS each status tells of its own. */
static void settle(int result, struct many *many, int n, const MPI_Request *after)
{
	int class = MPI_SUCCESS, i;

	PMPI_Error_class(result, &class);
	for (i = 0; i < n; i++)
		completed(class == MPI_ERR_IN_STATUS ? many->statuses[i].MPI_ERROR : result, many->before[i], after[i],
			  &many->statuses[i]);
}

int MPI_Startall(int n, MPI_Request requests[])
{
	struct many many;
	int result, i;

	if (!hpccr_anything_posted())
		return PMPI_Startall(n, requests);
	prepare(&many, n, requests, MPI_STATUSES_IGNORE);
	result = PMPI_Startall(n, requests);
	for (i = 0; result == MPI_SUCCESS && i < n; i++)
		hpccr_started(many.before[i], requests[i]);
	release(&many, MPI_STATUSES_IGNORE);
	return result;
}

int MPI_Waitall(int n, MPI_Request requests[], MPI_Status statuses[])
{
	struct many many;
	int result, i;

	if (!hpccr_anything_posted())
		return PMPI_Waitall(n, requests, statuses);
	prepare(&many, n, requests, statuses);
	result = PMPI_Waitall(n, requests, many.statuses);
	for (i = 0; result == MPI_SUCCESS && i < n; i++)
		hpccr_completed(many.before[i], &many.statuses[i]);
	if (result != MPI_SUCCESS)
		settle(result, &many, n, requests);
	release(&many, statuses);
	return result;
}

int MPI_Testall(int n, MPI_Request requests[], int *flag, MPI_Status statuses[])
{
	struct many many;
	int result, i;

	if (!hpccr_anything_posted())
		return PMPI_Testall(n, requests, flag, statuses);
	prepare(&many, n, requests, statuses);
	result = PMPI_Testall(n, requests, flag, many.statuses);
	for (i = 0; result == MPI_SUCCESS && *flag && i < n; i++)
		hpccr_completed(many.before[i], &many.statuses[i]);
	if (result != MPI_SUCCESS)
		settle(result, &many, n, requests);
	release(&many, statuses);
	return result;
}

int MPI_Waitany(int n, MPI_Request requests[], int *index, MPI_Status *status)
{
	struct many many;
	MPI_Status own;
	int result;

	if (!hpccr_anything_posted())
		return PMPI_Waitany(n, requests, index, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	prepare(&many, n, requests, MPI_STATUSES_IGNORE);
	*index = MPI_UNDEFINED;
	result = PMPI_Waitany(n, requests, index, status);
	if (*index >= 0 && *index < n)
		completed(result, many.before[*index], requests[*index], status);
	release(&many, MPI_STATUSES_IGNORE);
	return result;
}

int MPI_Testany(int n, MPI_Request requests[], int *index, int *flag, MPI_Status *status)
{
	struct many many;
	MPI_Status own;
	int result;

	if (!hpccr_anything_posted())
		return PMPI_Testany(n, requests, index, flag, status);
	if (status == MPI_STATUS_IGNORE)
		status = &own;
	prepare(&many, n, requests, MPI_STATUSES_IGNORE);
	*index = MPI_UNDEFINED;
	result = PMPI_Testany(n, requests, index, flag, status);
	if ((result != MPI_SUCCESS || *flag) && *index >= 0 && *index < n)
		completed(result, many.before[*index], requests[*index], status);
	release(&many, MPI_STATUSES_IGNORE);
	return result;
}

/* After an error the statuses are in the order of `indices`, and which have been written is not told. */
#define SOME(name)                                                                                                     \
	int MPI_##name(int n, MPI_Request requests[], int *count, int indices[], MPI_Status statuses[])                \
	{                                                                                                              \
		struct many many;                                                                                      \
		int result, i;                                                                                         \
                                                                                                                       \
		if (!hpccr_anything_posted())                                                                          \
			return PMPI_##name(n, requests, count, indices, statuses);                                     \
		prepare(&many, n, requests, statuses);                                                                 \
		result = PMPI_##name(n, requests, count, indices, many.statuses);                                      \
		for (i = 0; result == MPI_SUCCESS && *count != MPI_UNDEFINED && i < *count; i++)                       \
			hpccr_completed(many.before[indices[i]], &many.statuses[i]);                                   \
		for (i = 0; result != MPI_SUCCESS && i < n; i++)                                                       \
			completed(result, many.before[i], requests[i], NULL);                                          \
		release(&many, statuses);                                                                              \
		return result;                                                                                         \
	}

SOME(Waitsome)
SOME(Testsome)

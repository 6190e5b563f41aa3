/* Every way in which a message is counted, or is not, with a drain after each: mpirun -n 2 ./messages. Prints nothing if all is
 * well; what the drain says about messages it writes off goes to stderr. */
#include <mpi.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "traffic.h"

enum { LARGE = 1 << 22, ROUNDS = 200 };

static int rank, other, wrong;
static MPI_Comm own;

/* The messages to each rank that it has not received must be `first` and `second`. */
static void expect(const char *what, uint64_t first, uint64_t second)
{
	uint64_t found = hpccr_drain(own, 2000), wanted = rank ? second : first;

	if (found != wanted) {
		printf("%s: rank %d has %d messages not received, not %d\n", what, rank, (int)found, (int)wanted);
		wrong = 1;
	}
}

static void plain_and_large(char *in, char *out)
{
	MPI_Request requests[2];

	MPI_Sendrecv(out, 8, MPI_CHAR, other, 1, in, 8, MPI_CHAR, other, 1, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	expect("sendrecv", 0, 0);
	MPI_Irecv(in, LARGE, MPI_CHAR, MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &requests[0]);
	MPI_Isend(out, LARGE, MPI_CHAR, other, 2, MPI_COMM_WORLD, &requests[1]);
	expect("a large message under way", 0, 0);
	MPI_Waitall(2, requests, MPI_STATUSES_IGNORE);
	expect("the same, waited for", 0, 0);
}

static void not_received(char *in, char *out)
{
	int turn;

	if (rank == 0)
		for (turn = 0; turn < 3; turn++)
			MPI_Send(out, 8, MPI_CHAR, 1, 3, MPI_COMM_WORLD);
	/* However often it is asked: they are there. */
	for (turn = 0; turn < 3; turn++)
		expect("no receive", 0, 3);
	if (rank == 1) {
		MPI_Message message;
		MPI_Request request;
		int flag = 0;

		MPI_Mprobe(0, 3, MPI_COMM_WORLD, &message, MPI_STATUS_IGNORE);
		MPI_Mrecv(in, 8, MPI_CHAR, &message, MPI_STATUS_IGNORE);
		while (!flag)
			MPI_Improbe(0, 3, MPI_COMM_WORLD, &flag, &message, MPI_STATUS_IGNORE);
		MPI_Imrecv(in, 8, MPI_CHAR, &message, &request);
		MPI_Wait(&request, MPI_STATUS_IGNORE);
		MPI_Recv(in, 8, MPI_CHAR, 0, 3, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	}
	expect("received after all", 0, 0);
}

static void exchange(char *in, char *out)
{
#if MPI_VERSION >= 4 || (defined(OMPI_MAJOR_VERSION) && OMPI_MAJOR_VERSION >= 5)
	MPI_Request request;

	if (rank == 0) {
		MPI_Isendrecv(out, 8, MPI_CHAR, 1, 4, in, 8, MPI_CHAR, 1, 4, MPI_COMM_WORLD, &request);
		MPI_Wait(&request, MPI_STATUS_IGNORE);
		MPI_Isendrecv_replace(out, 8, MPI_CHAR, 1, 4, 1, 4, MPI_COMM_WORLD, &request);
		MPI_Wait(&request, MPI_STATUS_IGNORE);
	} else {
		int turn;

		for (turn = 0; turn < 2; turn++) {
			MPI_Recv(in, 8, MPI_CHAR, 0, 4, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
			MPI_Send(out, 8, MPI_CHAR, 0, 4, MPI_COMM_WORLD);
		}
	}
#endif
	(void)in, (void)out;
	expect("isendrecv with send and receive", 0, 0);
}

static void persistent(char *in, char *out)
{
	enum { MANY = 8 };
	MPI_Request sends[MANY], receives[MANY];
	int indices[MANY], done, count, turn, i, flag;

	for (i = 0; i < MANY; i++) {
		MPI_Send_init(out, 60000, MPI_CHAR, other, i, MPI_COMM_WORLD, &sends[i]);
		MPI_Recv_init(in + i * 60000, 60000, MPI_CHAR, other, i, MPI_COMM_WORLD, &receives[i]);
	}
	for (turn = 0; turn < ROUNDS; turn++) {
		/* Eager sends are complete before they are gone: Open MPI then starts another request in their place. */
		MPI_Startall(MANY, sends);
		if (turn % 50 == 0)
			expect("sends before their receives are started", MANY, MANY);
		MPI_Startall(MANY, receives);
		if (turn % 50 == 1)
			expect("persistent, under way", 0, 0);
		for (done = 0; done < MANY; done += count)
			MPI_Waitsome(MANY, receives, &count, indices, MPI_STATUSES_IGNORE);
		for (i = 0; i < MANY - 1; i++)
			MPI_Waitany(MANY, sends, &indices[0], MPI_STATUS_IGNORE);
		do
			MPI_Testall(MANY, sends, &flag, MPI_STATUSES_IGNORE);
		while (!flag);
	}
	for (i = 0; i < MANY; i++) {
		MPI_Request_free(&sends[i]);
		MPI_Request_free(&receives[i]);
	}
	expect("persistent", 0, 0);
}

/* What is seen at one end only is written off, at once or the second time that it is missing. */
static void one_ended(char *in, char *out)
{
	MPI_Request request;
	int turn, i;

	PMPI_Sendrecv(out, 8, MPI_CHAR, other, 5, in, 8, MPI_CHAR, other, 5, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	expect("neither", 0, 0);
	if (rank == 0)
		PMPI_Send(out, 8, MPI_CHAR, 1, 5, MPI_COMM_WORLD);
	else
		MPI_Recv(in, 8, MPI_CHAR, 0, 5, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	expect("the receive only", 0, 0);
	if (rank == 0)
		MPI_Send(out, 8, MPI_CHAR, 1, 5, MPI_COMM_WORLD);
	else
		PMPI_Recv(in, 8, MPI_CHAR, 0, 5, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	expect("the send only", 0, 1);
	expect("the send only, again", 0, 0);
	if (rank == 1) {
		MPI_Irecv(in, 8, MPI_CHAR, 0, 5, MPI_COMM_WORLD, &request);
		MPI_Request_free(&request);
	}
	MPI_Barrier(MPI_COMM_WORLD);
	if (rank == 0)
		MPI_Send(out, 8, MPI_CHAR, 1, 5, MPI_COMM_WORLD);
	expect("a receive that was freed", 0, 1);
	expect("a receive that was freed, again", 0, 0);
	MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
	for (turn = 0; turn < 3; turn++) {
		if (rank == 0) {
			MPI_Send(out, 8, MPI_CHAR, 1, 5, MPI_COMM_WORLD);
			MPI_Send(out, 8, MPI_CHAR, 1, 6, MPI_COMM_WORLD);
		} else {
			MPI_Request both[2];

			MPI_Irecv(in, 4, MPI_CHAR, 0, 5, MPI_COMM_WORLD, &both[0]);
			MPI_Irecv(in + 8, 8, MPI_CHAR, 0, 6, MPI_COMM_WORLD, &both[1]);
			if (turn == 0) {
				MPI_Wait(&both[0], MPI_STATUS_IGNORE);
				MPI_Wait(&both[1], MPI_STATUS_IGNORE);
			} else if (turn == 1) {
				MPI_Waitall(2, both, MPI_STATUSES_IGNORE);
			} else {
				int flag = 0;

				while (!flag && MPI_Testall(2, both, &flag, MPI_STATUSES_IGNORE) == MPI_SUCCESS)
					;
			}
			for (i = 0; i < 2; i++)
				if (both[i] != MPI_REQUEST_NULL)
					MPI_Wait(&both[i], MPI_STATUS_IGNORE);
		}
		MPI_Barrier(MPI_COMM_WORLD);
		hpccr_drain(own, 2000);
	}
	MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_ARE_FATAL);
	hpccr_drain(own, 2000);
	expect("receives that failed", 0, 0);
}

static void communicators(char *in, char *out)
{
	MPI_Comm twin, single, inter;
	int turn;

	for (turn = 0; turn < 3; turn++) {
		MPI_Comm_dup(MPI_COMM_WORLD, &twin);
		MPI_Sendrecv(out, 8, MPI_CHAR, other, 7, in, 8, MPI_CHAR, other, 7, twin, MPI_STATUS_IGNORE);
		if (rank == 0)
			MPI_Send(out, 8, MPI_CHAR, 1, 7, twin);
		expect("on a dup", 0, 1);
		if (rank == 1)
			MPI_Recv(in, 8, MPI_CHAR, 0, 7, twin, MPI_STATUS_IGNORE);
		MPI_Comm_free(&twin);
		expect("on one that is freed", 0, 0);
	}
	MPI_Comm_split(MPI_COMM_WORLD, rank, 0, &single);
	MPI_Intercomm_create(single, 0, MPI_COMM_WORLD, other, 8, &inter);
	if (rank == 0)
		MPI_Send(out, 8, MPI_CHAR, 0, 7, inter);
	expect("on an intercommunicator", 0, 1);
	if (rank == 1)
		MPI_Recv(in, 8, MPI_CHAR, 0, 7, inter, MPI_STATUS_IGNORE);
	expect("on an intercommunicator, received", 0, 0);
	MPI_Comm_free(&inter);
	MPI_Comm_free(&single);
}

struct talk {
	MPI_Comm comm;
	int tag;
	pthread_barrier_t *start;
};

static void *talk(void *of)
{
	struct talk *talk = of;
	int in, out = rank;

	pthread_barrier_wait(talk->start);
	MPI_Sendrecv(&out, 1, MPI_INT, other, talk->tag, &in, 1, MPI_INT, other, talk->tag, talk->comm, MPI_STATUS_IGNORE);
	return NULL;
}

/* The first messages on a communicator, by several threads at once. */
static void threads(void)
{
	enum { THREADS = 4 };
	pthread_barrier_t start;
	pthread_t thread[THREADS];
	struct talk talks[THREADS];
	int turn, i;

	pthread_barrier_init(&start, NULL, THREADS);
	for (turn = 0; turn < ROUNDS; turn++) {
		MPI_Comm comm;

		MPI_Comm_dup(MPI_COMM_WORLD, &comm);
		for (i = 0; i < THREADS; i++) {
			talks[i] = (struct talk){comm, i, &start};
			pthread_create(&thread[i], NULL, talk, &talks[i]);
		}
		for (i = 0; i < THREADS; i++)
			pthread_join(thread[i], NULL);
		MPI_Comm_free(&comm);
	}
	expect("several threads", 0, 0);
}

int main(int argc, char **argv)
{
	char *in, *out;
	int level;

	MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &level);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	other = 1 - rank;
	PMPI_Comm_dup(MPI_COMM_WORLD, &own);
	in = malloc(LARGE), out = calloc(1, LARGE);
	plain_and_large(in, out);
	not_received(in, out);
	exchange(in, out);
	persistent(in, out);
	communicators(in, out);
	one_ended(in, out);
	if (level == MPI_THREAD_MULTIPLE)
		threads();
	MPI_Finalize();
	return wrong;
}

/* Safe points with messages under way, on communicators of all kinds. Every byte that comes is checked.
 *
 *     mpirun -n 4 ./traffic       prints a line each round; in the working directory:
 *     outcomes.RANK               a line for each safe point at which something had happened, and for each hook on a restart
 *     halves, inter, end          files that the test makes: go on to the safe points of the next kind; come to an end
 *     keep, take                  rank 0 sends rank 1 a message for which no receive is posted; rank 1 receives it */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hpccr_mpi.h"

enum { SIZE = 300000, PAUSE = 10000 };

static const char *const outcomes[] = {"nothing", "resumed", "restarted", "abandoned"};
static int world_rank, points;
static FILE *log_file;

static void check(int right, const char *what)
{
	if (!right) {
		fprintf(stderr, "rank %d: wrong %s\n", world_rank, what);
		MPI_Abort(MPI_COMM_WORLD, 3);
	}
}

static void on_restart(void *argument)
{
	(void)argument;
	fprintf(log_file, "hook\n");
}

/* The safe point's number and what was said at it; numbers are the same on all ranks where all call them equally often. */
static void safe_point(MPI_Comm comm)
{
	int outcome = hpccr_safe_point(comm);

	points++;
	check(outcome >= 0 && outcome <= 3, "outcome");
	if (outcome != HPCCR_NOTHING) {
		fprintf(log_file, "%d %s\n", points, outcomes[outcome]);
		fflush(log_file);
	}
}

/* What the first rank finds is what all go by. */
static int there(const char *file, MPI_Comm comm)
{
	int found = access(file, F_OK) == 0;

	MPI_Bcast(&found, 1, MPI_INT, 0, comm);
	return found;
}

/* A ring with everything under way at the safe points. */
static void round_of(MPI_Comm ring, int round, MPI_Comm first, MPI_Comm second, MPI_Request persistent[2], int *swap)
{
	static char out[SIZE], in[SIZE], some[4][64];
	MPI_Request requests[6];
	MPI_Message message;
	MPI_Status status;
	int rank, size, next, before, i, done, count, indices[4];

	MPI_Comm_rank(ring, &rank);
	MPI_Comm_size(ring, &size);
	next = (rank + 1) % size, before = (rank + size - 1) % size;
	memset(out, round, SIZE);
	memset(in, ~round, SIZE);
	MPI_Irecv(in, SIZE, MPI_CHAR, before, 1, ring, &requests[0]);
	MPI_Isend(out, SIZE, MPI_CHAR, next, 1, ring, &requests[1]);
	for (i = 0; i < 4; i++)
		MPI_Irecv(some[i], 64, MPI_CHAR, MPI_ANY_SOURCE, 10 + i, ring, &requests[2 + i]);
	for (i = 0; i < 4; i++)
		MPI_Send(out, 64, MPI_CHAR, next, 10 + i, ring);
	swap[0] = round;
	MPI_Startall(2, persistent);
	MPI_Send(&round, 1, MPI_INT, next, 2, ring);
	MPI_Mprobe(before, 2, ring, &message, &status);
	safe_point(first);
	MPI_Mrecv(&i, 1, MPI_INT, &message, &status);
	check(i == round, "probed message");
	if (second != MPI_COMM_NULL)
		safe_point(second);
	for (done = 0; done < 4; done += count)
		MPI_Waitsome(4, requests + 2, &count, indices, MPI_STATUSES_IGNORE);
	MPI_Waitall(2, requests, MPI_STATUSES_IGNORE);
	MPI_Waitall(2, persistent, MPI_STATUSES_IGNORE);
	check(swap[1] == round, "persistent message");
	check(memcmp(in, out, SIZE) == 0, "large message");
	for (i = 0; i < 4; i++)
		check(memcmp(some[i], out, 64) == 0, "small message");
	usleep(PAUSE);
}

static void run(const char *word, const char *until, MPI_Comm ring, MPI_Comm first, MPI_Comm second, int each)
{
	MPI_Request persistent[2];
	int swap[2], rank, size, round, i, kept = 0, taken = 0;

	MPI_Comm_rank(ring, &rank);
	MPI_Comm_size(ring, &size);
	MPI_Send_init(&swap[0], 1, MPI_INT, (rank + 1) % size, 3, ring, &persistent[0]);
	MPI_Recv_init(&swap[1], 1, MPI_INT, (rank + size - 1) % size, 3, ring, &persistent[1]);
	for (round = 1; !there(until, ring); round++) {
		MPI_Comm twin;

		/* One that comes and goes, with a message of its own; the next one may have its handle. */
		MPI_Comm_dup(ring, &twin);
		MPI_Sendrecv(&round, 1, MPI_INT, (rank + 1) % size, 4, &i, 1, MPI_INT, MPI_ANY_SOURCE, 4, twin,
			     MPI_STATUS_IGNORE);
		check(i == round, "message on a dup");
		if (round % 5 == 0)
			safe_point(twin);
		MPI_Comm_free(&twin);
		for (i = 0; i < each; i++)
			round_of(ring, round, first, second, persistent, swap);
		if (!kept && there("keep", ring)) {
			kept = 1;
			if (rank == 0)
				MPI_Send(&round, 1, MPI_INT, 1, 5, ring);
			if (rank == 0)
				printf("kept\n");
		}
		if (kept && !taken && there("take", ring)) {
			taken = 1;
			if (rank == 1)
				MPI_Recv(&i, 1, MPI_INT, 0, 5, ring, MPI_STATUS_IGNORE);
			if (rank == 0)
				printf("taken\n");
		}
		if (world_rank == 0)
			printf("%s %d\n", word, round);
		fflush(stdout);
	}
	MPI_Request_free(&persistent[0]);
	MPI_Request_free(&persistent[1]);
	MPI_Barrier(MPI_COMM_WORLD);
}

int main(int argc, char **argv)
{
	MPI_Comm half, inter;
	char name[32];

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
	snprintf(name, sizeof name, "outcomes.%d", world_rank);
	log_file = fopen(name, "a");
	check(log_file != NULL, "log");
	hpccr_on_restart(on_restart, NULL);
	MPI_Comm_split(MPI_COMM_WORLD, world_rank % 2, world_rank, &half);
	MPI_Intercomm_create(half, 0, MPI_COMM_WORLD, 1 - world_rank % 2, 6, &inter);
	run("world", "halves", MPI_COMM_WORLD, MPI_COMM_WORLD, MPI_COMM_NULL, 1);
	/* Twice as many points in one half as in the other, and no message between them. */
	run("halves", "inter", half, half, MPI_COMM_NULL, 1 + world_rank % 2);
	run("inter", "end", MPI_COMM_WORLD, inter, MPI_COMM_WORLD, 1);
	MPI_Comm_free(&inter);
	MPI_Comm_free(&half);
	fclose(log_file);
	MPI_Finalize();
	return 0;
}

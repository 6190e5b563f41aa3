/* Heat in a square plate (Jacobi), rows shared out among the ranks, with a safe point in every step and hooks.
 *
 *     mpirun -n 4 ./stencil [-s steps] [-n points per side] [-l log file] [-p microseconds per step] [-c step]
 *
 * -c: rank 0 asks for a checkpoint at that step. What it prints is the same however often it is checkpointed. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hpccr_mpi.h"

static int rank, size, points = 200, rows;
static double *field, *next;
static FILE *events; /* of rank 0, if there is a log */

static void said(const char *what)
{
	if (events) {
		fprintf(events, "%s\n", what);
		fflush(events);
	}
}

static double *plate(void)
{
	double *new = calloc((size_t)(rows + 2) * (size_t)points, sizeof *new);

	if (!new)
		MPI_Abort(MPI_COMM_WORLD, 1);
	return new;
}

/* What can be made again need not be in the checkpoint. */
static void free_scratch(void *unused)
{
	(void)unused;
	free(next);
	next = NULL;
	said("scratch freed");
}

static void make_scratch(void *how)
{
	next = plate();
	said(how);
}

static void flush(void *log)
{
	fflush(log);
	said("log flushed");
}

static void exchange(void)
{
	int north = rank > 0 ? rank - 1 : MPI_PROC_NULL, south = rank + 1 < size ? rank + 1 : MPI_PROC_NULL;
	MPI_Request requests[4];

	MPI_Irecv(field, points, MPI_DOUBLE, north, 1, MPI_COMM_WORLD, &requests[0]);
	MPI_Irecv(field + (rows + 1) * points, points, MPI_DOUBLE, south, 2, MPI_COMM_WORLD, &requests[1]);
	MPI_Isend(field + points, points, MPI_DOUBLE, north, 2, MPI_COMM_WORLD, &requests[2]);
	MPI_Isend(field + rows * points, points, MPI_DOUBLE, south, 1, MPI_COMM_WORLD, &requests[3]);
	MPI_Waitall(4, requests, MPI_STATUSES_IGNORE);
}

static double advance(void)
{
	double change = 0, *swap;
	int i, j;

	memcpy(next, field, (size_t)(rows + 2) * (size_t)points * sizeof *next);
	for (i = 1; i <= rows; i++) {
		if ((rank == 0 && i == 1) || (rank == size - 1 && i == rows))
			continue; /* the plate's edges keep their temperature */
		for (j = 1; j < points - 1; j++) {
			double *here = field + i * points + j;

			next[i * points + j] = 0.25 * (here[-points] + here[points] + here[-1] + here[1]);
			change += fabs(next[i * points + j] - *here);
		}
	}
	swap = field, field = next, next = swap;
	return change;
}

int main(int argc, char **argv)
{
	int steps = 1000, pause = 0, ask_at = -1, step, option, k, j;
	const char *log_name = NULL;
	double change, *all;
	FILE *log = NULL;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	while ((option = getopt(argc, argv, "s:n:l:p:c:")) != -1) {
		switch (option) {
		case 's': steps = atoi(optarg); break;
		case 'n': points = atoi(optarg); break;
		case 'l': log_name = optarg; break;
		case 'p': pause = atoi(optarg); break;
		case 'c': ask_at = atoi(optarg); break;
		default: MPI_Abort(MPI_COMM_WORLD, 2);
		}
	}
	rows = points * (rank + 1) / size - points * rank / size;
	field = plate();
	next = plate();
	all = malloc((size_t)size * sizeof *all);
	if (!all)
		MPI_Abort(MPI_COMM_WORLD, 1);
	if (rank == 0)
		for (j = 0; j < points; j++)
			field[points + j] = 100;
	if (rank == 0 && log_name) {
		char name[4096];

		snprintf(name, sizeof name, "%s.events", log_name);
		log = fopen(log_name, "a");
		events = fopen(name, "a");
		if (!log || !events)
			MPI_Abort(MPI_COMM_WORLD, 1);
		hpccr_on_quiesce(flush, log);
	}
	hpccr_on_quiesce(free_scratch, NULL); /* registered last, called first */
	hpccr_on_resume(make_scratch, "scratch made: resumed");
	hpccr_on_restart(make_scratch, "scratch made: restarted");

	for (step = 1; step <= steps; step++) {
		exchange();
		change = advance();
		MPI_Gather(&change, 1, MPI_DOUBLE, all, 1, MPI_DOUBLE, 0, MPI_COMM_WORLD);
		if (rank == 0) {
			for (change = 0, k = 0; k < size; k++)
				change += all[k]; /* in this order: the sum is the same in every run */
			printf("step %d change %.17g\n", step, change);
			fflush(stdout);
			if (log)
				fprintf(log, "step %d change %.17g\n", step, change);
			if (step == ask_at && hpccr_request_checkpoint() != 0)
				said("nobody to ask for a checkpoint");
		}
		if (pause)
			usleep((useconds_t)pause);
		switch (hpccr_safe_point(MPI_COMM_WORLD)) {
		case HPCCR_RESUMED: said("resumed"); break;
		case HPCCR_RESTARTED: said("restarted"); break;
		case HPCCR_ABANDONED: said("abandoned"); break;
		}
	}
	if (log)
		fclose(log);
	if (events)
		fclose(events);
	MPI_Finalize();
	return 0;
}

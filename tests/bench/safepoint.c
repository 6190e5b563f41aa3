/* What a safe point costs when nothing is asked: nanoseconds per call, and a loop with and without it.
 *
 *     mpirun -n 2 ./safepoint        one line: ns per call, ns per turn of the loop without, with */
#include <stdio.h>
#include <time.h>

#include "hpccr_mpi.h"

enum { CALLS = 2000000, TURNS = 200000, WORK = 300 };

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static double turns(int safe_points)
{
	volatile double sum = 0;
	double start = now();
	int i, j;

	for (i = 0; i < TURNS; i++) {
		for (j = 0; j < WORK; j++)
			sum = sum * 0.5 + j;
		if (safe_points)
			hpccr_safe_point(MPI_COMM_WORLD);
	}
	return (now() - start) / TURNS;
}

int main(int argc, char **argv)
{
	double start, call, without, with;
	int i, rank;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	hpccr_safe_point(MPI_COMM_WORLD); /* the first is collective */
	start = now();
	for (i = 0; i < CALLS; i++)
		hpccr_safe_point(MPI_COMM_WORLD);
	call = (now() - start) / CALLS;
	without = turns(0);
	with = turns(1);
	if (rank == 0)
		printf("%.1f %.1f %.1f\n", call, without, with);
	MPI_Finalize();
	return 0;
}

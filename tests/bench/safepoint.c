/* What a safe point costs when nothing is asked: nanoseconds of processor time per call, and a loop with and without it.
 * The least of several rounds, in which both loops are timed in turn: others may be using the machine.
 *
 *     mpirun -n 2 ./safepoint        one line: ns per call, ns per turn of the loop without, with */
#define _GNU_SOURCE
#include <stdio.h>
#include <time.h>

#include "hpccr_mpi.h"

enum { ROUNDS = 30, CALLS = 100000, TURNS = 10000, WORK = 300 };

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
	return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static double least(double one, double other)
{
	return one < other ? one : other;
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
	int i, rank, round;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	hpccr_safe_point(MPI_COMM_WORLD); /* the first is collective */
	call = without = with = 1e12;
	for (round = 0; round < ROUNDS; round++) {
		start = now();
		for (i = 0; i < CALLS; i++)
			hpccr_safe_point(MPI_COMM_WORLD);
		call = least(call, (now() - start) / CALLS);
		without = least(without, turns(0));
		with = least(with, turns(1));
	}
	if (rank == 0)
		printf("%.1f %.1f %.1f\n", call, without, with);
	MPI_Finalize();
	return 0;
}

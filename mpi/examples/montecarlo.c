/* Pi by throwing points, from a queue of tasks that rank 0 hands out: fast ranks do more of them.
 *
 *     mpirun -n 4 ./montecarlo [-r rounds] [-t tasks per round] [-p points per task]
 *
 * Ranks of a work queue do not pass through the same steps. So the tasks come in rounds: at the end of one the queue is
 * empty and no message is under way, and there all ranks, the one with the queue too, call the safe point. It is no
 * barrier: a worker may be in the next round while others finish this one, so messages to rank 0 are tagged by round. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "hpccr_mpi.h"

enum { TASK = 0, ROUND_OVER = -1 };

static uint64_t throw(uint64_t task, long points)
{
	uint64_t state = task * UINT64_C(0x9E3779B97F4A7C15) + 1, inside = 0;
	long i;

	for (i = 0; i < points; i++) {
		double x, y;

		state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		x = (double)(state >> 40) / (1 << 24);
		state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		y = (double)(state >> 40) / (1 << 24);
		inside += x * x + y * y < 1;
	}
	return inside;
}

/* Rank 0: one round; the points inside the circle. */
static uint64_t serve(int workers, int64_t first, int tasks, int tag)
{
	uint64_t total = 0, result;
	int64_t task;
	int given = 0, left = workers;
	MPI_Status status;

	while (left) {
		MPI_Recv(&result, 1, MPI_UINT64_T, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, &status);
		total += result;
		task = given < tasks ? first + given : ROUND_OVER;
		if (task == ROUND_OVER)
			left--;
		else
			given++;
		MPI_Send(&task, 1, MPI_INT64_T, status.MPI_SOURCE, TASK, MPI_COMM_WORLD);
	}
	return total;
}

static void work(long points, int tag)
{
	uint64_t result = 0; /* with the first message of a round comes none */
	int64_t task;

	for (;;) {
		MPI_Send(&result, 1, MPI_UINT64_T, 0, tag, MPI_COMM_WORLD);
		MPI_Recv(&task, 1, MPI_INT64_T, 0, TASK, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
		if (task == ROUND_OVER)
			return;
		result = throw((uint64_t)task, points);
	}
}

int main(int argc, char **argv)
{
	int rounds = 100, tasks = 100, rank, size, round, option;
	uint64_t inside = 0;
	long points = 10000;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	while ((option = getopt(argc, argv, "r:t:p:")) != -1) {
		switch (option) {
		case 'r': rounds = atoi(optarg); break;
		case 't': tasks = atoi(optarg); break;
		case 'p': points = atol(optarg); break;
		default: MPI_Abort(MPI_COMM_WORLD, 2);
		}
	}
	if (size < 2)
		MPI_Abort(MPI_COMM_WORLD, 2);
	for (round = 0; round < rounds; round++) {
		int tag = 1 + round % 1000;

		if (rank == 0) {
			inside += serve(size - 1, (int64_t)round * tasks, tasks, tag);
			printf("round %d inside %" PRIu64 "\n", round + 1, inside);
			fflush(stdout);
		} else {
			work(points, tag);
		}
		hpccr_safe_point(MPI_COMM_WORLD);
	}
	if (rank == 0)
		printf("pi is about %.10f\n", 4.0 * (double)inside / ((double)rounds * tasks * (double)points));
	MPI_Finalize();
	return 0;
}

/* Included in front of an example's source: each safe point takes a while until the file `gate` is there, so that the
 * program has not ended before the test is done with it. It prints the same as ever. */
#define _GNU_SOURCE
#include <unistd.h>

#include "hpccr_mpi.h"

static int slowly(MPI_Comm comm)
{
	if (access("gate", F_OK) != 0)
		usleep(100000);
	return hpccr_safe_point(comm);
}

#define hpccr_safe_point slowly

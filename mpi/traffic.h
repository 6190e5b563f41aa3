/* Point-to-point messages of this process, counted per peer through MPI's profiling interface. */
#ifndef HPCCR_TRAFFIC_H
#define HPCCR_TRAFFIC_H

#include <mpi.h>
#include <stdint.h>

/* Collective over `all`, an intra-communicator that nobody else uses: bring what is under way between its ranks to an end,
 * as far as receives are posted. Returns the messages that its ranks have sent to this one and it has not received. */
uint64_t hpccr_drain(MPI_Comm all);

/* The same with the communicator by its address, whatever type MPI_Comm is: for hpccr.mpi. */
uint64_t hpccr_drain_at(MPI_Comm *all);

#endif

/* Point-to-point messages of this process, counted per peer through MPI's profiling interface. */
#ifndef HPCCR_TRAFFIC_H
#define HPCCR_TRAFFIC_H

#include <mpi.h>
#include <stdint.h>

/* Collective over `all`, an intra-communicator that nobody else uses: bring what is under way between its ranks to an end,
 * as far as receives are posted. patience: milliseconds that a posted receive may show no progress in. Returns the messages
 * that its ranks have sent to this one and it has not received. */
uint64_t hpccr_drain(MPI_Comm all, uint64_t patience);

/* The same with the communicator by its address, whatever type MPI_Comm is: for hpccr.mpi. */
uint64_t hpccr_drain_at(MPI_Comm *all, uint64_t patience);

/* The rest is for pmpi.c. A send to that peer was started; a message came with this status. */
void hpccr_sent(int peer, MPI_Comm comm);
void hpccr_received(const MPI_Status *status, MPI_Comm comm);

/* A new request: a receive (peer -1), or a persistent send. A persistent one is inactive until it is started. */
void hpccr_post(MPI_Request handle, MPI_Comm comm, int peer, int persistent);

/* A persistent request, as its handle was before and is after the start. */
void hpccr_started(MPI_Request before, MPI_Request after);

/* A request, as it was before a call that completed it. status: NULL if it failed. */
void hpccr_completed(MPI_Request before, const MPI_Status *status);

/* A request is given up. */
void hpccr_freed(MPI_Request request);

/* Whether any request is known: if not, calls that complete some need not be looked at. */
int hpccr_anything_posted(void);

#endif

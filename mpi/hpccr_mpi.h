/* Safe points of an MPI program for checkpoints by hpccr; see docs/user/mpi.md.
 *
 * Link with -lhpccr_mpi in front of the MPI library, or preload libhpccr_mpi.so. Outside of hpccr all of this does nothing. */
#ifndef HPCCR_MPI_H
#define HPCCR_MPI_H

#include <mpi.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
	HPCCR_NOTHING = 0,   /* no checkpoint was made while this rank stood here */
	HPCCR_RESUMED = 1,   /* one was made, and the program goes on */
	HPCCR_RESTARTED = 2, /* the program has been restored since this rank's last safe point, perhaps on other nodes */
	HPCCR_ABANDONED = 3  /* one was begun and given up; the program goes on */
};

/* A place where all ranks of `comm` (both groups of an inter-communicator) could call MPI_Barrier(comm). All of them
 * call it equally often. The first call on a communicator is collective; later ones cost some nanoseconds and do not
 * communicate, unless a checkpoint has been asked for: then it returns when that is over. One thread at a time.
 * Returns one of the above, or -1 if the communicator is no good. Every rank is told of every restart once, but not all at the
 * same safe point if they did not all stand at one when the checkpoint was made: what is returned may differ between
 * ranks, and must not decide whether they communicate. */
int hpccr_safe_point(MPI_Comm comm);

/* Functions to be called in hpccr_safe_point, as by pthread_atfork(3): `on_quiesce` ones before the job is frozen, the last
 * registered first; `on_resume` ones after that, the first registered first, or instead `on_restart` ones if the program was
 * restored: these run after every restart, also where the checkpoint was made without the ranks standing still. None of
 * them may communicate with other ranks. Return 0, or -1 with errno ENOMEM. */
typedef void hpccr_hook(void *argument);
int hpccr_on_quiesce(hpccr_hook *hook, void *argument);
int hpccr_on_resume(hpccr_hook *hook, void *argument);
int hpccr_on_restart(hpccr_hook *hook, void *argument);

/* Ask for a checkpoint; it is made at one of the next safe points. Any rank may ask, and all that ask within a second are
 * one. Returns 0,
 * or -1 with errno ENOTCONN where nobody listens: the program does not run under hpccr. */
int hpccr_request_checkpoint(void);

#ifdef __cplusplus
}
#endif
#endif

/* What the parts of the plugin share: the site's settings, what a job asks for, one entry per context. */
#ifndef HPCCR_PLUGIN_H
#define HPCCR_PLUGIN_H

#include <stdbool.h>

#include <slurm/spank.h>

#include "options.h"

/* From the plugin's line in plugstack.conf; the strings are Slurm's, or constants. */
struct site {
	const char *hpccr;    /* absolute path of the hpccr command on compute nodes */
	const char *interval; /* for jobs that name only a directory or a count */
};

/*
 * The arguments of the plugin's line; what cannot be used is logged and has its default.
 *
 * Only for a job that is to be checkpointed: what slurmstepd logs is in the job's output.
 */
struct site site_read(int argc, char **argv);

/* What the job asks for, as far as its options have been seen in this process; NULL: not given. */
struct request {
	char *values[OPTION_KINDS];
};

extern struct request request;

/* Whether the job is to be checkpointed: some option was given, and --checkpoint=none was not. */
bool request_made(void);

/* Make the options known to Slurm. To be called from slurm_spank_init only. */
void register_options(spank_t spank);

/* sbatch and salloc, before and after they have read the options. */
void submit_init(spank_t spank);
void submit_options_read(int argc, char **argv);

/* slurmstepd, in the process that becomes the batch script. */
void job_task_init(spank_t spank, int argc, char **argv);

#endif

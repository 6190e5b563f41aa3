/*
 * SPANK plugin of hpccr: `sbatch --checkpoint=30m job.sh`.
 *
 * Only a dispatch on the context; no error is returned, so that nothing here can fail somebody else's job.
 */
#include "plugin.h"

#include <slurm/slurm_version.h>

#if SLURM_VERSION_NUMBER < SLURM_VERSION_NUM(23, 11, 0)
#error "this Slurm has no spank_prepend_task_argv(): 23.11 is the first that has"
#endif

SPANK_PLUGIN(hpccr, 1)

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
	(void)argc;
	(void)argv;
	switch (spank_context()) {
	case S_CTX_ALLOCATOR:
		submit_init(spank);
		break;
	case S_CTX_REMOTE:
		register_options(spank);
		break;
	default:
		break;
	}
	return 0;
}

int slurm_spank_init_post_opt(spank_t spank, int argc, char **argv)
{
	(void)spank;
	if (spank_context() == S_CTX_ALLOCATOR)
		submit_options_read(argc, argv);
	return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
	job_task_init(spank, argc, argv);
	return 0;
}

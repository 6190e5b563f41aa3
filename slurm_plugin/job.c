/* On the node: the batch script becomes what `hpccr run` runs. */
#include "plugin.h"

#include <stdio.h>
#include <unistd.h>

#include <slurm/slurm.h>

#define UNSUPPORTED 13 /* hpccr.errors.ExitCode */

static const char refusal[] = "echo \"hpccr: error: --checkpoint was asked for, but this node has no $1\" >&2\n"
			      "echo \"hint: the administrator installs hpccr on all nodes, or names it in "
			      "plugstack.conf: hpccr=PATH\" >&2\n"
			      "exit 13";

static bool is_batch_script(spank_t spank)
{
	uint32_t step;

	return spank_get_item(spank, S_JOB_STEPID, &step) == ESPANK_SUCCESS && step == SLURM_BATCH_SCRIPT;
}

static int set_variable(spank_t spank, const char *name, const char *value)
{
	spank_err_t rc;

	if (value == NULL)
		return 0;
	rc = spank_setenv(spank, name, value, 1);
	if (rc == ESPANK_SUCCESS)
		return 0;
	slurm_error("hpccr: couldn't set %s: %s", name, spank_strerror(rc));
	return -1;
}

static int prepend(spank_t spank, const char *hpccr)
{
	const char *run[] = { hpccr, "run", "--batch", "--" };
	const char *refuse[] = { "/bin/sh", "-c", refusal, "sh", hpccr };
	spank_err_t rc;

	if (access(hpccr, X_OK) == 0)
		rc = spank_prepend_task_argv(spank, 4, run);
	else
		rc = spank_prepend_task_argv(spank, 5, refuse);
	if (rc == ESPANK_SUCCESS)
		return 0;
	slurm_error("hpccr: couldn't put %s in front of the batch script: %s", hpccr, spank_strerror(rc));
	return -1;
}

static int wrap(spank_t spank, struct site site)
{
	const char *interval = request.values[OPTION_INTERVAL];

	if (set_variable(spank, "HPCCR_CHECKPOINT_INTERVAL", interval ? interval : site.interval) < 0)
		return -1;
	if (set_variable(spank, "HPCCR_STORE_DIR", request.values[OPTION_DIR]) < 0)
		return -1;
	if (set_variable(spank, "HPCCR_STORE_KEEP", request.values[OPTION_KEEP]) < 0)
		return -1;
	return prepend(spank, site.hpccr);
}

void job_task_init(spank_t spank, int argc, char **argv)
{
	if (!request_made() || !is_batch_script(spank))
		return;
	/*
	 * This process is about to become the script, which must not run unprotected. An error returned to Slurm would
	 * count against the node or be ignored, as plugstack.conf says; this way it is the job's.
	 */
	if (wrap(spank, site_read(argc, argv)) < 0)
		_exit(UNSUPPORTED);
}

/* In sbatch and salloc: variables that stand for options, and what goes with --checkpoint. */
#define _GNU_SOURCE /* RTLD_DEFAULT, program_invocation_short_name */
#include "plugin.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Slurm's variable that is read as an option of this plugin is FROM_USER + name, the one for the node TO_NODE + name. */
#define TO_NODE "_SLURM_SPANK_OPTION_hpccr_"
#define FROM_USER "SLURM_SPANK_" TO_NODE
#define ALIAS "hpccr_"

/* In the order of enum option_kind: ends of variables' names, and the variables that `hpccr run` reads. */
static const char *const suffixes[OPTION_KINDS] = { "checkpoint", "checkpoint_dir", "checkpoint_keep" };
static const char *const ours[OPTION_KINDS] = { "CHECKPOINT", "CHECKPOINT_DIR", "CHECKPOINT_KEEP" };
static const char *const exported[OPTION_KINDS] = { "HPCCR_CHECKPOINT_INTERVAL", "HPCCR_STORE_DIR", "HPCCR_STORE_KEEP" };

static bool in_salloc(void)
{
	return strcmp(program_invocation_short_name, "salloc") == 0;
}

void submit_init(spank_t spank)
{
	char name[128], variable[64];
	const char *value;

	register_options(spank);
	for (int kind = 0; kind < OPTION_KINDS; kind++) {
		/* Inside a job these are what that job was submitted with, which is not said of the new one. */
		snprintf(name, sizeof(name), FROM_USER ALIAS "%s", suffixes[kind]);
		unsetenv(name);
		snprintf(name, sizeof(name), FROM_USER "%s", suffixes[kind]);
		unsetenv(name);
		/* Slurm reads its variable after the script's lines and before the command line, which wins. */
		snprintf(variable, sizeof(variable), "%s_%s", in_salloc() ? "SALLOC" : "SBATCH", ours[kind]);
		value = getenv(variable);
		if (value != NULL && setenv(name, value, 1) != 0)
			slurm_error("hpccr: couldn't take %s: %s", variable, strerror(errno));
	}
}

/* Both spellings may have been given: only the value that counts travels to the node, under the first one's name. */
static void forward(int kind)
{
	char name[128];

	snprintf(name, sizeof(name), TO_NODE ALIAS "%s", suffixes[kind]);
	unsetenv(name);
	snprintf(name, sizeof(name), TO_NODE "%s", suffixes[kind]);
	if (setenv(name, request.values[kind], 1) != 0)
		slurm_error("hpccr: couldn't pass %s on to the job: %s", name, strerror(errno));
}

/* The job's Comment until `hpccr run` is at work in it: by this `hpccr list` knows a job that runs unprotected. */
#define NOT_YET "hpccr: waiting to start" /* hpccr.slurm.query.WAITING */

/*
 * What goes with --checkpoint unless the user says otherwise: output that survives a requeue, that there may be one, and
 * a comment.
 *
 * SPANK has nothing for changing sbatch's own options. sbatch and its library export what cli_filter plugins do that with
 * (src/common/slurm_opt.h); where a release does not, users add the options themselves and nothing is lost: `hpccr run`
 * keeps a copy of output that is truncated.
 */
static void complete_options(void)
{
	void *sbatch_options = dlsym(RTLD_DEFAULT, "opt");
	bool (*is_set)(void *, const char *);
	int (*set)(void *, const char *, const char *, bool);

	/* The way dlsym(3) has for function pointers. */
	*(void **)&is_set = dlsym(RTLD_DEFAULT, "slurm_option_isset");
	*(void **)&set = dlsym(RTLD_DEFAULT, "slurm_option_set");
	if (sbatch_options == NULL || is_set == NULL || set == NULL) {
		slurm_verbose("hpccr: this sbatch lets no plugin set --open-mode=append and --requeue");
		return;
	}
	if (!is_set(sbatch_options, "open-mode") && set(sbatch_options, "open-mode", "append", false) != 0)
		slurm_error("hpccr: couldn't set --open-mode=append");
	if (!is_set(sbatch_options, "requeue") && !is_set(sbatch_options, "no-requeue") &&
	    set(sbatch_options, "requeue", "", false) != 0)
		slurm_error("hpccr: couldn't set --requeue");
	if (!is_set(sbatch_options, "comment") && set(sbatch_options, "comment", NOT_YET, false) != 0)
		slurm_error("hpccr: couldn't set --comment");
}

/* salloc has no script: what the user runs `hpccr run` on is his business, it finds the values in the environment. */
static void set_variables(int argc, char **argv)
{
	struct site site = site_read(argc, argv);
	const char *value;

	for (int kind = 0; kind < OPTION_KINDS; kind++) {
		value = request.values[kind];
		if (value == NULL && kind == OPTION_INTERVAL)
			value = site.interval;
		if (value != NULL && setenv(exported[kind], value, 1) != 0)
			slurm_error("hpccr: couldn't set %s: %s", exported[kind], strerror(errno));
	}
}

void submit_options_read(int argc, char **argv)
{
	for (int kind = 0; kind < OPTION_KINDS; kind++) {
		if (request.values[kind] != NULL)
			forward(kind);
	}
	if (!request_made())
		return;
	/* Inside a job these are of that job, and a job that is neither requeued nor heterogeneous gets none of its own. */
	unsetenv("SLURM_RESTART_COUNT");
	unsetenv("SLURM_HET_SIZE");
	if (in_salloc())
		set_variables(argc, argv);
	else
		complete_options();
}

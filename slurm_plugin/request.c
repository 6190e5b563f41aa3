/* The options, their values, and what Slurm tells about them. */
#include "plugin.h"

#include <stdlib.h>
#include <string.h>

struct request request;

static int take(int kind, const char *text, int remote);

/* Both spellings of each option; a kind's last value seen is the one that counts. */
static struct spank_option options[] = {
	{ "checkpoint", "TIME|auto|requeue|none",
	  "checkpoint the job: every TIME (30 is minutes; 90s, 30m, 2h, HH:MM:SS), when it pays off (auto), only when it "
	  "has to leave its nodes (requeue), or not at all (none)",
	  1, OPTION_INTERVAL, take },
	{ "checkpoint-dir", "DIR", "where its checkpoints go, on storage that all nodes share", 1, OPTION_DIR, take },
	{ "checkpoint-keep", "N", "how many complete checkpoints are kept", 1, OPTION_KEEP, take },
	{ "hpccr-checkpoint", "TIME|auto|requeue|none", "the same as --checkpoint", 1, OPTION_INTERVAL, take },
	{ "hpccr-checkpoint-dir", "DIR", "the same as --checkpoint-dir", 1, OPTION_DIR, take },
	{ "hpccr-checkpoint-keep", "N", "the same as --checkpoint-keep", 1, OPTION_KEEP, take },
};

static const char *option_name(int kind)
{
	return options[kind].name;
}

/* Slurm's callback: nonzero refuses the submission. On the node (remote) nothing is refused any more. */
static int take(int kind, const char *text, int remote)
{
	const char *refusal = NULL;
	char *copy;

	if (kind < 0 || kind >= OPTION_KINDS || text == NULL)
		return -1;
	if (!remote)
		refusal = option_refusal((enum option_kind)kind, text);
	if (refusal != NULL) {
		slurm_error("hpccr: --%s: \"%s\" %s", option_name(kind), text, refusal);
		return -1;
	}
	copy = strdup(text);
	if (copy == NULL) {
		slurm_error("hpccr: couldn't keep --%s: out of memory", option_name(kind));
		return -1;
	}
	free(request.values[kind]);
	request.values[kind] = copy;
	return 0;
}

bool request_made(void)
{
	const char *interval = request.values[OPTION_INTERVAL];

	if (interval != NULL && strcmp(interval, "none") == 0)
		return false;
	for (int kind = 0; kind < OPTION_KINDS; kind++) {
		if (request.values[kind] != NULL)
			return true;
	}
	return false;
}

void register_options(spank_t spank)
{
	spank_err_t rc;

	for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++) {
		rc = spank_option_register(spank, &options[i]);
		if (rc != ESPANK_SUCCESS)
			slurm_error("hpccr: couldn't register --%s: %s", options[i].name, spank_strerror(rc));
	}
}
